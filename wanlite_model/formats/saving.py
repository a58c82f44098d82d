"""What every export has in common: a name that is free, a temporary place, a real reader before it is put in place, and one sentence."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import WanConfig
from ..errors import WanLiteError
from ..files import read_json, regular
from .card import PREFIX, StudentCard
from .container import read_header
from .place import put_in_place, sentence_for, temporary_place

FORMAT = 1                              # of what is written beside the weights; its key also says that WanLite wrote the file
MODEL_FILE = "diffusion_model.safetensors"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"              # the name that diffusers looks for
INDEX_FILE = DIFFUSERS_FILE + ".index.json"                         # and Wan-Video's WanModel.from_pretrained
CARD_FILE, PICTURE_FILE = "README.md", "picture.png"
WORKFLOW_END = ".workflow.json"
OURS = ("config.json", MODEL_FILE, DIFFUSERS_FILE, INDEX_FILE)      # the last two names are in a folder that WanLite wrote
HEAD = 2**20                            # bytes from the start of a file in which what WanLite wrote about it stands


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What a reader said about the new file. difference: the largest of the velocity, relative; None where it could not run, and why.

    notes: sentences on what else was found out on the way.
    """
    reader: str
    difference: float | None
    why: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    """path: the folder, or the single file. file: with the weights. bytes: of these. sentence: what to tell the user first; notes: and then."""
    path: Path
    file: Path
    bytes: int
    verified: Verified | None
    sentence: str
    workflow: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All of it, a sentence or two a line."""
        return "\n".join((self.sentence, *self.notes))


def put(destination: Path, write: Callable[[Path], int], verify: Callable[[Path], Verified] | None,
        beside: Mapping[Path, Callable[[Path], Any]] = {}) -> tuple[int, Verified | None]:
    """Has `destination` written as a temporary path, which is verified and then moved into place together with what goes beside it.

    write: makes the file or folder and returns the bytes of its weights. beside: {target elsewhere: writes it}. Raises WanLiteError, and then
    nothing on disk has changed.
    """
    try:
        with ExitStack() as stack:
            new = stack.enter_context(temporary_place(destination)) / destination.name
            size = write(new)
            verified = verify(new) if verify else None
            moves = [(new, destination)]
            for target, make in beside.items():
                moves.append((stack.enter_context(temporary_place(target)) / target.name, target))
                make(moves[-1][0])
            put_in_place(moves, destination)
    except OSError as error:
        raise sentence_for(error, destination.name) from error
    return size, verified


def provenance(card: StudentCard | None, **more: Any) -> dict[str, Any]:
    """What WanLite says about a student in a file; what is None is left out."""
    return {"format": FORMAT, **(card.to_json() if card else {}), **{key: value for key, value in more.items() if value is not None}}


def write_text_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stem(destination: Path, ending: str) -> str:
    """A file's name without its ending, for check_name. Raises WanLiteError when it has another."""
    if destination.suffix != ending:
        raise WanLiteError(f"{destination.name} is no file name for a model.", f"A single file ends with {ending}.")
    return destination.name.removesuffix(ending)


def check_free(destination: Path, beside: Path | None, overwrite: bool) -> None:
    """Raises WanLiteError when a name is taken, or when overwriting would remove what WanLite did not write."""
    if destination.is_dir():
        known = {*OURS, CARD_FILE, PICTURE_FILE} if _ours(destination) else OURS
        foreign = sorted(child.name for child in destination.iterdir() if child.name not in known and not child.name.endswith(WORKFLOW_END))
        if foreign or destination.suffix in (".safetensors", ".gguf"):
            raise WanLiteError(f"The folder {destination.name} is already there and holds {foreign[0] if foreign else 'a student'}, "
                               "which would be lost.", "", "Save under another name.")
    for path in (destination, beside):
        taken = path is not None and (any(path.iterdir()) if path.is_dir() else path.exists())
        if taken and not overwrite:
            raise WanLiteError(f"{path.name} is already there.", "Nothing is overwritten unless you say so.",
                               "Save under another name, or turn overwrite on.")
    if destination.exists() and not _ours(destination):
        raise WanLiteError(f"{destination.name} is already there, and WanLite did not write it.", "It would be lost.", "Save under another name.")


def _ours(path: Path) -> bool:
    """Whether WanLite wrote what is there, or nothing is."""
    try:
        if path.suffix == ".gguf" and path.is_file():
            with path.open("rb") as file:
                return (PREFIX + "format").encode() in file.read(HEAD)
        if not path.is_dir():
            return any(key.startswith(PREFIX) for key in read_header(path).metadata)
        return not any(path.iterdir()) or "_wanlite" in read_json(path / "config.json")
    except (OSError, ValueError, TypeError, WanLiteError):
        return False


def head_of(file: Path) -> bytes:
    """The start of a file of weights that WanLite wrote, in any format; of any other file nothing."""
    try:
        with regular(file).open("rb") as opened:
            head = opened.read(HEAD)
    except OSError:
        return b""
    return head if PREFIX.encode() in head else b""


def carries(head: bytes, card: StudentCard) -> bool:
    """Whether the file that begins so holds the student with this card: its measured errors have all their digits there, as GGUF and as
    safetensors write text.
    """
    return bool(card.measured) and all(value.encode() in head or json.dumps(value)[1:-1].encode() in head for value in card.to_metadata().values())


def saved(name: str, config: WanConfig, size: int, verified: Verified | None) -> str:
    """The sentence on a WAN of `size` bytes, and whether it was verified."""
    return verdict(f"Saved {name}: {config.num_layers} blocks of {config.dim}, {size / 2**20:,.1f} MiB of weights", verified)


def verdict(saved: str, verified: Verified | None) -> str:
    """`saved`, and whether it was verified: the one sentence that a save may say so in."""
    if verified is None:
        return f"{saved}; not verified, since nothing was there to open it with."
    if verified.difference is None:
        return f"{saved}; not verified: {verified.why}"
    return f"{saved}; verified: {verified.reader} opened it, and its velocity differs by {verified.difference:.1e} at most."
