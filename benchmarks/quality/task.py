"""One row with one seed as a piece of work, and what it found before."""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wanlite_model.distill.checkpoint import RunFolder

from ..teachers import WORLDS
from .rows import Row

FIRST = "balls"         # the world that LoRAs are carried from


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One row of one world with one seed; `folder` is its own, and what others made lies in folders beside it."""
    row: Row
    world: str
    seed: int
    videos: int
    home: Path

    @property
    def shared(self) -> Path:
        """What rows, seeds and sizes of the table have in common: the teacher's answers, starts, and what is compared with."""
        return self.home.parent / "shared" / self.world

    @property
    def folder(self) -> Path:
        return self.folder_of(self.row.name)

    def folder_of(self, name: str) -> Path:
        safe = "".join(c if c.isalnum() else "-" for c in name)
        return self.home / self.world / f"{safe}-{self.seed}"

    @property
    def source(self) -> Path:
        """Where the first world's LoRA comes from that the row begins with."""
        return replace(self, world=FIRST).folder_of(self.row.lora_of)

    @property
    def needs(self) -> list[Path]:
        """The folders of the tasks that must be done before."""
        return [*(self.folder_of(name) for name in self.row.needs), *([self.source] if self.row.lora_of else [])]

    @property
    def teacher(self) -> str:
        """A hash of the world's teacher; empty before it is trained."""
        file = WORLDS[self.world].teacher
        return hashlib.sha256(file.read_bytes()).hexdigest()[:8] if file.is_file() else ""

    @property
    def cache(self) -> tuple | None:
        """Alike for tasks that ask the same teacher the same; None for those that ask nothing."""
        row, recipe = self.row, self.row.recipe
        if recipe is None:
            return None
        asked = recipe.student_steps if not recipe.objective.startswith("velocity") else (recipe.renoised, recipe.full_range)
        return self.world, self.seed, row.frames, row.of, asked, recipe.teacher_steps

    @property
    def has_asked(self) -> bool:
        """Whether its training has all of the teacher's answers: it plans its steps only then."""
        return RunFolder(self.folder / "run").noted("legs") is not None

    @property
    def key(self) -> str:
        """A hash of all that decides the result, but for the code: the row, the teacher, and the keys of what the row needs."""
        needed = [_noted(folder).get("key") for folder in self.needs]
        told = [asdict(self.row), self.world, self.seed, self.videos, self.teacher, needed]
        return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:16]

    def result(self) -> dict | None:
        """What was measured before, or None."""
        noted = _noted(self.folder)
        return noted["scores"] if noted.get("key") == self.key else None


def _noted(folder: Path) -> dict:
    try:
        return json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
