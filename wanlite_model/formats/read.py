"""Opening a WAN from disk: a file or a folder, in WAN's names or diffusers', checked before one tensor is read."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from ..config import WanConfig
from ..errors import WanLiteError
from ..files import ENDINGS, read_json
from .card import StudentCard, read_metadata
from .container import Header, read_header
from .gguf_file import GGUF, Block, read_gguf
from .keymap import is_diffusers, to_wan_names, wan_shapes
from .quantised import FLOATS, Place, UnknownFormat, formats_told, with_scales

# What tools put before WAN's names; ComfyUI opens the first, the third and the fourth.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.", "transformer.")
MARKS = ("head.modulation", "condition_embedder.time_proj.weight")      # one of these is in every WAN, in one of its vocabularies
FLOAT8 = {"F8_E4M3", "F8_E5M2"}
INDEX_END = ".safetensors.index.json"
Stored = TypeVar("Stored", Place, Block)
CHOOSE = "Choose a WAN 2.1 or 2.2 file from models/diffusion_models."


@dataclass(frozen=True, kw_only=True, slots=True)
class WanFile:
    """An open WAN. Names are WAN's own whatever the file calls them; tensors come on the CPU, floats in their stored dtype, what is kept in
    fewer bits unpacked in bfloat16 (see quantised.UNPACKED).

    metadata: the (first) file's header metadata. provenance: what WanLite wrote about a student, {} for any other WAN.
    """
    config: WanConfig
    metadata: dict[str, str]
    provenance: dict[str, Any]
    places: Mapping[str, Place | Block]
    files: Mapping[Path, BinaryIO] = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights."""
        amount: Counter[torch.dtype] = Counter()
        for place in self.places.values():
            amount[place.dtype] += prod(place.shape)
        return amount.most_common(1)[0][0]

    @property
    def packed(self) -> bool:
        """Whether some of the weights are kept in fewer bits than they are handed out in."""
        return any(place.packed for place in self.places.values())

    @property
    def card(self) -> StudentCard | None:
        """The student's card, where this is a saved student. Raises WanLiteError when it is there and cannot be one."""
        return StudentCard.from_json(self.provenance)

    def names(self) -> tuple[str, ...]:
        return tuple(self.places)

    def tensor(self, name: str) -> Tensor:
        return self.places[name].read(self.files)

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor), or those of these names, read one at a time."""
        return ((name, self.tensor(name)) for name in (self.places if names is None else names))


@contextmanager
def open_wan(path: Path) -> Iterator[WanFile]:
    """Opens a .safetensors or .gguf file, or a WAN, WanLite or diffusers folder (sharded or not), for as long as the `with` lasts.

    Raises WanLiteError when it is not a whole WAN: nothing is guessed, nothing missing is filled in, no pickle is ever opened; UnknownFormat
    when some weights are kept in a way that only others can unpack.
    """
    path = Path(path)
    if not os.path.exists(path):                # Path's own raises on a name that no file can have
        raise WanLiteError(f"{path.name} is not there.", "", CHOOSE)
    folder = path if path.is_dir() else None
    fields = _read_config(folder) if folder else {}
    files: tuple[Path, ...] = ()
    metadata: dict[str, str] = {}
    if folder is None and path.suffix.lower() == GGUF:
        blocks, metadata = read_gguf(path)
        places = _bare(blocks)
    else:
        files = _files_of(folder) if folder else (_only_safetensors(path),)
        headers = {file: read_header(file) for file in files}
        metadata = headers[files[0]].metadata
        places = _collect(path, headers)
    places = _wan_names(path, places, fields)
    config = _config(path, {name: place.shape for name, place in places.items()}, fields)
    provenance = fields["_wanlite"] if isinstance(fields.get("_wanlite"), dict) else read_metadata(metadata)
    with ExitStack() as stack:
        handles = {file: stack.enter_context(file.open("rb")) for file in files}
        yield WanFile(config=config, metadata=metadata, provenance=provenance, places=places, files=handles)


def _only_safetensors(path: Path) -> Path:
    if path.suffix.lower() in ENDINGS:
        return path
    raise WanLiteError(f"{path.name} is not a .safetensors or .gguf file.", "",
                       "A pickle can run code when it is opened: convert it to safetensors first.")


def _files_of(folder: Path) -> tuple[Path, ...]:
    """The weight files of a folder: those its index names, else the only one there is."""
    indexes = sorted(folder.glob("*" + INDEX_END))
    if len(indexes) > 1:
        raise WanLiteError(f"{folder.name} has {len(indexes)} index files.", "One tells which file holds which tensor.",
                           "Remove all but the one that belongs to the weights.")
    if indexes:
        return _indexed(folder, indexes[0])
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return (found[0],)
    if found:
        raise WanLiteError(f"{folder.name} has {len(found)} .safetensors files and no index file.",
                           f"A sharded model comes with one (…{INDEX_END}).", "Download it too, or choose one of the files.")
    inner = [child.name for child in sorted(folder.iterdir()) if child.is_dir() and any(child.glob("*.safetensors"))]
    fix = f"Choose the folder {' or '.join(inner)} in it." if inner else CHOOSE
    raise WanLiteError(f"{folder.name} has no .safetensors file.", "", fix)


def _indexed(folder: Path, index: Path) -> tuple[Path, ...]:
    fields = _json(index)
    named = fields.get("weight_map")
    names = sorted({name for name in named.values() if isinstance(name, str)}) if isinstance(named, dict) else []
    if not names or any(set(name) & set("/\\:") or name.startswith(".") or not name.endswith(".safetensors") for name in names):
        raise WanLiteError(f"{index.name} does not name .safetensors files of its own folder.", "", "Download the folder again.")
    absent = [name for name in names if not os.path.isfile(folder / name)]
    if absent:
        raise WanLiteError(f"{index.name} names {absent[0]}, which is not there ({len(absent)} of {len(names)} files are missing).",
                           "", "Download the missing files.")
    return tuple(folder / name for name in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = read_json(path)
    except (OSError, ValueError) as error:
        raise WanLiteError(f"{path.name} cannot be read as JSON ({error}).", "", "Copy or download the folder again.") from error
    if not isinstance(fields, dict):
        raise WanLiteError(f"{path.name} holds no fields.", "", "Copy or download the folder again.")
    return fields


def _read_config(folder: Path) -> dict[str, Any]:
    found = [folder / name for name in ("config.json", "student_config.json") if (folder / name).is_file()]
    return _json(found[0]) if found else {}


def _collect(path: Path, headers: Mapping[Path, Header]) -> dict[str, Place]:
    """All shards as one, without the prefix that every name shares, and each weight with the scale that unpacks it."""
    places: dict[str, Place] = {}
    for file, header in headers.items():
        for name, entry in header.entries.items():
            if name in places:
                raise WanLiteError(f"{path.name} holds {name!r} twice, in two of its files.", "", "Download the folder again.")
            places[name] = Place(file, entry)
    places, prefix = _bare(places), _prefix(places)
    if not any(mark in places for mark in MARKS):
        return places                           # what it is instead is told better by its names
    try:
        places = with_scales(places, formats_told(headers.values(), prefix))
    except WanLiteError as error:
        raise type(error)(f"{path.name}: {error.found}", error.expected, error.fix) from error
    rare = next((name for name, place in places.items() if place.entry.dtype not in FLOATS | FLOAT8 and place.scale is None), None)
    if rare:
        raise UnknownFormat(f"{path.name} is quantised in a way that it does not name, or of a rare dtype ({rare!r}, {places[rare].entry.dtype}).",
                            "This reader takes float32, float16, bfloat16, float8, and what ComfyUI marks as quantised.",
                            "Open it with ComfyUI's Load Diffusion Model and connect its MODEL as the teacher.")
    return places


def _prefix(names: Iterable[str]) -> str:
    """What stands before WAN's or diffusers' names, one of PREFIXES; "" where nothing does."""
    names = set(names)
    return next((prefix for prefix in PREFIXES if any(prefix + mark in names for mark in MARKS)), "")


def _bare(named: Mapping[str, Stored]) -> dict[str, Stored]:
    prefix = _prefix(named)
    return {name.removeprefix(prefix): place for name, place in named.items()}


def _wan_names(path: Path, places: dict[str, Stored], fields: Mapping[str, Any]) -> dict[str, Stored]:
    if is_diffusers(places):
        names = to_wan_names(places)
        places = {names[name]: place for name, place in places.items()}
    if MARKS[0] not in places:
        first = f" (first: {min(places)})" if places else ""
        found = f"{path.name} is not a WAN: {MARKS[0]!r} is missing among its {len(places)} tensors{first}."
        if "projection_factor" in fields:
            raise WanLiteError(found, "It comes from a predecessor of WanLite, whose blocks have no cross-attention, no modulation and no "
                               "rotary positions; such weights cannot become a WAN.", "Create a new student of that size from a WAN teacher.")
        raise WanLiteError(found, "", CHOOSE)
    return places


def _config(path: Path, shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Any]) -> WanConfig:
    """The architecture that weights and config.json agree on, with every tensor there, and no other."""
    try:
        found = WanConfig.from_shapes(shapes)
        _check_tensors(shapes, wan_shapes(found))
    except WanLiteError as error:
        raise WanLiteError(f"{path.name}: {error.found}", error.expected, error.fix) from error
    if not fields:
        return found
    try:
        stated = WanConfig.from_dict(fields)
    except WanLiteError as error:
        raise WanLiteError(f"config.json of {path.name}: {error.found}", error.expected, error.fix) from error
    if "in_channels" not in fields:             # Wan-Video's config does not say whether an i2v has the CLIP branch (2.1) or not (2.2)
        stated = replace(stated, img_emb=found.img_emb)
    for name in ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "img_emb"):
        said, is_ = getattr(stated, name), getattr(found, name)
        if said != is_:
            raise WanLiteError(f"config.json of {path.name} says {name}={said}, and its weights have {is_}.",
                               "Both describe one model.", "Put the config.json that belongs to these weights beside them.")
    if "flf2v" in (found.model_type, stated.model_type):
        return found                            # the weights decide: this kind alone has a tensor of its own
    return stated


def _check_tensors(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises WanLiteError unless names and shapes are exactly those of a WAN with this many blocks."""
    for told, names in (("is missing", expected.keys() - shapes.keys()), ("is not a tensor of this WAN", shapes.keys() - expected.keys())):
        if names:
            blocks = 1 + max(int(name.split(".")[1]) for name in expected if name.startswith("blocks."))
            raise WanLiteError(f"{min(names)!r} {told} ({len(names)} such tensors).",
                               f"A WAN with blocks 0 to {blocks - 1} has {len(expected)} tensors.",
                               "The file was cut, pruned or made for another kind of WAN: choose the original.")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise WanLiteError(f"{name!r} has shape {list(shapes[name])}.", f"In this WAN it has {list(shape)}.",
                               "Blocks of different widths load in no reader: choose the original file.")
