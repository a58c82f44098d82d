"""A student by name: what a wire of the graph carries, never a module or tensors."""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import WanConfig
from ..errors import WanLiteError
from ..files import ENDINGS
from ..formats.card import StudentCard
from ..formats.container import read_header
from ..formats.gguf_file import GGUF
from ..formats.keymap import wan_size
from ..formats.lora import Lora, read_lora
from ..formats.read import MARKS, WanFile, open_wan
from ..formats.write import MODEL_FILE
from ..kinds import check_kinds
from ..legacy import WEIGHTS, read_recipe
from ..teacher import fingerprint_tensors
from ..transformer import WanLiteStudent
from .plan import CompressionPlan


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Opened:
    """A student's open file and its LoRAs."""
    source: WanFile
    loras: tuple[Lora, ...]

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the whole student, or of these names, one at a time and in the file's dtypes.

        What a LoRA changes is in fp32, not rounded.
        """
        found = self.source.tensors(names)
        for lora in self.loras:
            found = lora.merged(found)
        return iter(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentHandle:
    """A student on disk. folder: where it is, or its single file. fingerprint: of what its weights came from. card: how to sample it.

    loras: files of adapters that belong to it, each over the weights with those before it merged in. same_as: the fingerprint of the
    teacher whose weights lie in the folder as they are, or of the file that was loaded; empty where they were cut or trained.
    """
    folder: str
    config: WanConfig
    plan: CompressionPlan
    fingerprint: str
    card: StudentCard | None = None
    loras: tuple[str, ...] = ()
    same_as: str = ""

    def __post_init__(self) -> None:
        check_kinds(self)

    @property
    def file(self) -> Path:
        """The file with the weights, without its LoRAs."""
        place = Path(self.folder)
        return place if place.suffix.lower() in (*ENDINGS, GGUF) else place / MODEL_FILE

    def check_present(self) -> None:
        """Raises WanLiteError when its files are gone."""
        gone = next((path for path in map(Path, (self.folder, *self.loras)) if not os.path.exists(path)), None)
        if gone is not None:
            raise WanLiteError(f"The student is not on disk any more: {gone.name} is gone.",
                               "Its start or its run was cleared, or removed by hand.", "Queue its graph again: the node that made it then runs again.")

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """The weights, for as long as the `with` lasts. Raises WanLiteError when they are gone or not whole."""
        self.check_present()
        with open_wan(Path(self.folder)) as source:
            yield Opened(source=source, loras=tuple(read_lora(Path(path), self.config) for path in self.loras))

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the weights on disk."""
        with open_wan(Path(self.folder)) as source:
            return source.dtype

    def load(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> WanLiteStudent:
        """The student in memory, its LoRAs merged in. dtype: None takes that of most of the file."""
        with self.open() as opened:
            module = WanLiteStudent.filled(self.config, opened.tensors(), dtype or opened.source.dtype, device)
        module.card = self.card
        return module

    @classmethod
    def of(cls, path: Path) -> StudentHandle:
        """A saved student, or any WAN file or folder, which is then taken as its own teacher. Raises WanLiteError on anything else; on a
        predecessor's student with what it says field by field.
        """
        try:
            with open_wan(path) as source:
                fingerprint = fingerprint_tensors(source.tensors())
                return cls(folder=str(path), config=source.config, plan=_plan(source.config, source.card), card=source.card,
                           fingerprint=fingerprint, same_as=fingerprint)
        except WanLiteError:
            _refuse_predecessors(path)
            raise

    def to_json(self) -> dict[str, Any]:
        return {"folder": self.folder, "loras": list(self.loras), "same_as": self.same_as, "config": asdict(self.config), "plan": self.plan.to_json(),
                "fingerprint": self.fingerprint, "card": None if self.card is None else self.card.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StudentHandle:
        """Raises WanLiteError when the value is not one that to_json wrote."""
        names = {f.name for f in fields(cls)}
        try:
            if set(value) != names:
                raise TypeError(f"fields {', '.join(sorted(set(value) ^ names))}")
            card = None if value["card"] is None else StudentCard.from_json(value["card"])
            return cls(folder=value["folder"], config=WanConfig(**value["config"]), plan=CompressionPlan.from_json(value["plan"]),
                       fingerprint=value["fingerprint"], card=card, loras=tuple(value["loras"]), same_as=value["same_as"])
        except TypeError as error:
            raise WanLiteError(f"The note about a student cannot be read ({error}).", "Another version of WanLite may have written it.",
                               "Create the student again.") from error


def _refuse_predecessors(path: Path) -> None:
    """Raises WanLiteError, its config read as a recipe, when what could not be opened is a student that a predecessor wrote, or its config alone."""
    folder = path if os.path.isdir(path) else path.parent           # Path's own raises on a name that no file can have
    files = sorted(folder.glob("*.safetensors")) if folder == path else [path] if os.path.isfile(path) and path.name in WEIGHTS else None
    recipe = None if files is None else read_recipe(folder)
    if recipe is None or any(name.endswith(MARKS) for file in files for name in read_header(file).entries):
        return                          # its weights are a WAN's: what is wrong is something else
    size = "" if recipe.config is None else (f"As a WAN that is {recipe.config.num_layers} blocks of {recipe.config.dim} with FFN {recipe.config.ffn_dim}: "
                                             f"{wan_size(recipe.config) / 1e9:.3g} billion parameters.")
    weights = "Its weights cannot become a WAN" if files else "It holds no .safetensors file, and weights of its kind could not become a WAN"
    raise WanLiteError(f"{folder.name} is a student of WanLite's predecessor. {weights}: its blocks have no cross-attention, no modulation and no rotary "
                       "positions. As a recipe it says:\n" + "\n".join((*(f"- {line}" for line in recipe.lines), size)), "", recipe.steps())


def _plan(config: WanConfig, card: StudentCard | None) -> CompressionPlan:
    """What the card says of the teacher; without one, a plan that prunes nothing."""
    keep = card.keep if card and len(card.keep) == config.num_layers else tuple(range(config.num_layers))
    teacher = card.recipe if card else {}
    ffn_dim = max(teacher.get("teacher_ffn_dim", 0), config.ffn_dim)
    noted = card is not None and keep == card.keep and config.ffn_dim == card.ffn_dim < ffn_dim
    return CompressionPlan(keep=keep, ffn_dim=config.ffn_dim, method="given",
                           teacher_layers=max(teacher.get("teacher_layers", 0), max(keep) + 1),           # a teacher can be smaller than its student
                           teacher_ffn_dim=ffn_dim, ffn_kept=card.ffn_kept if noted else ())
