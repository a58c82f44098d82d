"""One row with one seed as a piece of work, and what it found before."""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
    def cache(self) -> tuple | None:
        """Alike for tasks that ask the same teacher the same; None for those that ask nothing."""
        row, recipe = self.row, self.row.recipe
        if recipe is None:
            return None
        asked = recipe.student_steps if not recipe.objective.startswith("velocity") else (recipe.renoised, recipe.full_range)
        return self.world, self.seed, row.frames, row.of, asked, recipe.teacher_steps

    @property
    def key(self) -> str:
        """A hash of all that decides the result, but for the code."""
        return hashlib.sha256(json.dumps([asdict(self.row), self.world, self.seed, self.videos], default=str).encode()).hexdigest()[:16]

    def result(self) -> dict | None:
        """What was measured before, or None."""
        try:
            noted = json.loads((self.folder / "scores.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return noted["scores"] if noted["key"] == self.key else None
