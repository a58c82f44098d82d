"""One row with one seed as a piece of work, and what it found before."""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .rows import Row


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
