"""Asking the teacher: how much, as far as time and disk go, and what is missing of it."""
from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..prompts import PromptBank
from ..teacher import Teacher
from .budget import GIB, check_disk
from .data import TeacherCache, plan_units
from .events import ASKING, Stage
from .inputs import Inputs
from .job import DistillJob
from .paths import asked_of
from .room import clear_cache, in_use, touch

SHARE = 0.4                     # of a job's minutes may go into it


def fill(job: DistillJob, cache_root: Path, teacher: Teacher, parts: Inputs, shard: tuple[int, int] = (0, 1), other: Teacher | None = None
         ) -> Iterator[Stage]:
    """Asks the teacher all that a job with a number of steps asks it, or one part of n: shard (i, n)."""
    asking = Asking(job=job, root=cache_root, teacher=asked_of(job, teacher, other), prompts=parts.prompts, latents=parts.latents)
    with in_use(cache_root):
        yield from asking.fill(asking.cache(None), shard)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Asking:
    """Who is asked, for which job: the teacher, or both experts as one. root: the folder that the answers of all jobs are kept in."""
    job: DistillJob
    root: Path
    teacher: Teacher
    prompts: PromptBank
    latents: Tensor | None

    def cache(self, most: int | None, first: int | None = None) -> TeacherCache:
        """The units that a leg draws from. most: how many; None are as many as the job's steps can use. first: those of the first leg."""
        job = self.job if most is None or first is None else replace(self.job, steps=0)         # then it is no longer the steps that decide how many
        return TeacherCache(self.root, self.job, plan_units(job, self.prompts, self.latents, most, first))

    def most_units(self, steps: int) -> int:
        """As many as so many steps of the job can use."""
        return len(plan_units(replace(self.job, steps=steps), self.prompts, self.latents))

    def fill(self, cache: TeacherCache, shard: tuple[int, int] = (0, 1)) -> Iterator[Stage]:
        """Asks for what is missing, or for one part of n of it."""
        for done, total in cache.needed.fill(self.teacher, self.prompts, self.latents, shard):
            yield Stage(name=ASKING, done=done, total=total)

    def affordable(self, elapsed: Callable[[], float]) -> Generator[Stage, None, int]:
        """How many units the job's minutes allow, from the time that the first group of those that are missing takes. elapsed: seconds of them so far."""
        whole = self.cache(None)
        affordable = len(whole.units)
        missing = next((group for group in whole.groups() if not all(map(whole.intact, group))), None)
        if missing is not None:
            begun = time.monotonic()
            yield from self.fill(TeacherCache(self.root, self.job, missing))
            each = max(1e-3, (time.monotonic() - begun) / len(missing))
            affordable = max(0, int((SHARE * 60 * self.job.minutes - elapsed()) / each))
        return whole.affordable(affordable)

    def make_room(self, cache: TeacherCache, free: int) -> None:
        """Clears what the limits allow no longer. free: bytes of the drive. Raises WanLiteError when it lacks room even so."""
        units, missing, limit = [cache.path(unit) for unit in cache.units], cache.needed.missing_bytes, self.job.levers.cache_gib
        touch(units)
        freed = clear_cache(self.root, int(limit * GIB), units, missing) if limit else 0
        check_disk(missing, free + freed, self.root, "What the teacher is still to be asked")
