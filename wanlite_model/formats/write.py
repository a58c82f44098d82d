"""The one writer of students: streamed into a temporary place, checked, verified, then put in place at once."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from ..config import WanConfig
from ..errors import WanLiteError
from ..files import patiently, read_json
from .card import PREFIX, StudentCard
from .container import Writer, read_header
from .keymap import wan_shapes
from .lora import Lora, write_lora
from .place import check_name, put_in_place, sentence_for, temporary_place
from .workflow import stock_workflow

MODEL_FILE = "diffusion_model.safetensors"
FORMAT = 1                              # of what is written beside the weights; its key also says that WanLite wrote the file
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"      # the name Wan-Video's WanModel.from_pretrained looks for
WORKFLOW_END = ".workflow.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What a reader said about the new file. difference: the largest of the velocity, relative; None where it could not run, and why."""
    reader: str
    difference: float | None
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    """path: the folder, or the single file. file: the safetensors. bytes: of the weights. sentence: what to tell the user."""
    path: Path
    file: Path
    bytes: int
    verified: Verified | None
    sentence: str
    workflow: Path | None


def write_student(destination: Path, *, config: WanConfig, tensors: Iterable[tuple[str, Tensor]],
                  layout: Literal["folder", "single file"] = "folder", dtype: torch.dtype | None = None,
                  card: StudentCard | None = None, legacy: Mapping[str, Any] | None = None, image_size: Any = None,
                  verify: Callable[[Path], Verified] | None = None, overwrite: bool = False,
                  workflow_folder: Path | None = None) -> SaveReport:
    """Writes a WAN that every reader opens, as a folder, or as `<name>.safetensors` with nothing beside it.

    tensors: (name, tensor), taken one at a time. dtype: None keeps each tensor's. verify: opens the new file before it is put in
    place; what it raises ends the save. workflow_folder: where a single file's workflow goes (a folder holds its own).
    Raises WanLiteError, and then nothing on disk has changed.
    """
    if layout not in ("folder", "single file"):
        raise WanLiteError(f"layout is {layout!r}.", "It is 'folder' or 'single file'.")
    destination, single = Path(destination).absolute(), layout == "single file"
    name = check_name(_name(destination, single))
    workflow = (workflow_folder and Path(workflow_folder).absolute() / (name + WORKFLOW_END)) if single else destination / (name + WORKFLOW_END)
    _check_free(destination, workflow if single else None, overwrite)
    provenance = {"format": FORMAT, **(card.to_json() if card else {}), **({"legacy": dict(legacy)} if legacy else {}),
                  **({"image_size": image_size} if image_size is not None else {})}
    try:
        with ExitStack() as stack:
            place = stack.enter_context(temporary_place(destination))
            new = place / destination.name
            new_file = new if single else new / MODEL_FILE
            new_file.parent.mkdir(exist_ok=True)
            size = _write_model(new_file, config, tensors, dtype, provenance)
            if not single:
                _write_beside(new, config, size, provenance)
            verified = verify(new_file) if verify else None
            moves = [(new, destination)]
            graph = stock_workflow(destination.name if single else os.path.join(name, MODEL_FILE), card or StudentCard(), config)
            if graph and workflow:
                home = stack.enter_context(temporary_place(workflow)) if single else new
                _json(home / workflow.name, graph)
                moves += [(home / workflow.name, workflow)] if single else []
            put_in_place(moves, destination)
    except OSError as error:
        raise sentence_for(error, destination.name) from error
    return SaveReport(path=destination, file=destination if single else destination / MODEL_FILE, bytes=size, verified=verified,
                      sentence=_sentence(destination.name, config, size, verified), workflow=workflow if graph and workflow else None)


def save_lora(destination: Path, lora: Lora, *, dtype: torch.dtype = torch.bfloat16, card: StudentCard | None = None,
              verify: Callable[[Path], Verified] | None = None, overwrite: bool = False) -> SaveReport:
    """Writes `<name>.safetensors` under the keys that ComfyUI's LoRA loader takes; otherwise as write_student does."""
    destination = Path(destination).absolute()
    check_name(_name(destination, single=True))
    _check_free(destination, None, overwrite)
    try:
        with temporary_place(destination) as place:
            new = place / destination.name
            size = write_lora(new, lora, dtype=dtype, card=card)
            verified = verify(new) if verify else None
            put_in_place([(new, destination)], destination)
    except OSError as error:
        raise sentence_for(error, destination.name) from error
    told = f"Saved {destination.name}: a LoRA on {len(lora.factors)} layers, {size / 2**20:,.1f} MiB"
    return SaveReport(path=destination, file=destination, bytes=size, verified=verified, sentence=_verdict(told, verified), workflow=None)


def _name(destination: Path, single: bool) -> str:
    if not single:
        return destination.name
    if destination.suffix != ".safetensors":
        raise WanLiteError(f"{destination.name} is no file name for a model.", "A single file ends with .safetensors.")
    return destination.name.removesuffix(".safetensors")


def _check_free(destination: Path, workflow: Path | None, overwrite: bool) -> None:
    """Raises WanLiteError when a name is taken, or when overwriting would remove what WanLite did not write."""
    if destination.is_dir():
        foreign = sorted(child.name for child in destination.iterdir()
                         if child.name not in ("config.json", MODEL_FILE, INDEX_FILE) and not child.name.endswith(WORKFLOW_END))
        if foreign or destination.suffix == ".safetensors":
            raise WanLiteError(f"The folder {destination.name} is already there and holds {foreign[0] if foreign else 'a student'}, "
                               "which would be lost.", "", "Save under another name.")
    for path in (destination, workflow):
        taken = path is not None and (any(path.iterdir()) if path.is_dir() else path.exists())
        if taken and not overwrite:
            raise WanLiteError(f"{path.name} is already there.", "Nothing is overwritten unless you say so.",
                               "Save under another name, or turn overwrite on.")
    if destination.exists() and not _ours(destination):
        raise WanLiteError(f"{destination.name} is already there, and WanLite did not write it.", "It would be lost.", "Save under another name.")


def _ours(path: Path) -> bool:
    """Whether WanLite wrote what is there, or nothing is."""
    try:
        if not path.is_dir():
            return any(key.startswith(PREFIX) for key in read_header(path).metadata)
        return not any(path.iterdir()) or "_wanlite" in read_json(path / "config.json")
    except (OSError, ValueError, TypeError, WanLiteError):
        return False


def _write_model(file: Path, config: WanConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None,
                 provenance: Mapping[str, Any]) -> int:
    metadata = {"format": "pt", **{PREFIX + key: json.dumps(value) for key, value in provenance.items()}}
    shapes = wan_shapes(config)
    part = file.with_suffix(".part")                    # no loader lists this ending while it is being written
    with Writer(part, shapes, metadata) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor, dtype)
            del tensor                                  # before the next one is made: one at a time
        size = writer.finish()
    patiently(os.rename, part, file)
    # The library every reader uses must agree with our own writer. Its "pt" would map the file to be written to, which Windows, and Linux under a
    # limit, count as so much memory.
    with safe_open(file, framework="np") as reference:
        found = {name: tuple(reference.get_slice(name).get_shape()) for name in reference.keys()}
    if found != shapes:
        raise WanLiteError(f"{file.name} reads back differently from what was written.", "", "Check the disk, then save again.")
    return size


def _write_beside(folder: Path, config: WanConfig, size: int, provenance: Mapping[str, Any]) -> None:
    _json(folder / "config.json", {**config.to_json(), "image_size": provenance.get("image_size"), "_wanlite": dict(provenance)})
    _json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(wan_shapes(config), MODEL_FILE)})


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sentence(name: str, config: WanConfig, size: int, verified: Verified | None) -> str:
    return _verdict(f"Saved {name}: {config.num_layers} blocks of {config.dim}, {size / 2**20:,.1f} MiB of weights", verified)


def _verdict(saved: str, verified: Verified | None) -> str:
    if verified is None:
        return f"{saved}; not verified, since nothing was there to open it with."
    if verified.difference is None:
        return f"{saved}; not verified: {verified.why}"
    return f"{saved}; verified: {verified.reader} opened it, and its velocity differs by {verified.difference:.1e} at most."
