"""How long a run is. It begins with one leg; asked for more, it gets another, with a warm-up and a fall of the learning rate of its own."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .checkpoint import RunFolder
from .job import DistillJob, Recipe
from .optim import lr_at

LEAST_STEPS = 10                # of a job that has minutes, however few they are
SPARE = 0.95                    # of the time left for steps: they are not all as long as those that were measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """Steps `first` + 1 to `last`. planned: steps that its learning rate is laid out over. every: steps between evaluations. units: of the
    teacher's answers that it draws from. ended: the step that it was ended at before its time.
    """
    first: int
    planned: int
    every: int
    units: int
    ended: int | None = None

    @property
    def last(self) -> int:
        return self.first + self.planned if self.ended is None else self.ended

    def due(self, step: int) -> bool:
        """Whether the weights after this step are to be evaluated."""
        return step > self.first and ((step - self.first) % self.every == 0 or step == self.last)

    def lr(self, step: int, recipe: Recipe) -> float:
        """The learning rate of the step after `step` finished ones."""
        return lr_at(step - self.first, self.planned, recipe)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What was measured before the first step. seconds: a step; before: what else the whole job takes, evaluations included."""
    seconds: float
    before: float

    def steps(self, minutes: float) -> int:
        """That so many minutes allow, of the whole job."""
        return max(LEAST_STEPS, int(SPARE * (60 * minutes - self.before) / self.seconds))


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """The legs of a run, in order."""
    legs: tuple[Leg, ...]

    @classmethod
    def begin(cls, steps: int, units: int, evaluations: int) -> Course:
        return cls(legs=(Leg(first=0, planned=steps, every=-(-steps // evaluations), units=units),))

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.legs[-1].last

    def at(self, step: int) -> Leg:
        """The leg that the step after `step` finished ones belongs to; at the end, the last one."""
        return next((leg for leg in self.legs if step < leg.last), self.legs[-1])

    def due(self, step: int) -> bool:
        return any(leg.due(step) for leg in self.legs if leg.first < step <= leg.last)

    def next_evaluation(self, step: int) -> int:
        """The first one after so many steps, or at them."""
        return next((at for at in range(max(1, step), self.total) if self.due(at)), self.total)

    def extended(self, steps: int, most_units: int, evaluations: int, ended: int | None = None) -> Course:
        """With a leg to `steps`, which draws from as many more of the teacher's answers as it is longer. ended: where the last one was."""
        before = self.legs if ended is None else (*self.legs[:-1], replace(self.legs[-1], ended=ended))
        first, units = before[-1].last, before[-1].units
        more = max(units, min(most_units, units * steps // max(1, first)))
        return Course(legs=(*before, Leg(first=first, planned=steps - first, every=-(-(steps - first) // evaluations), units=more)))

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(leg) for leg in self.legs]

    @classmethod
    def from_json(cls, legs: Sequence[Mapping[str, Any]]) -> Course:
        return cls(legs=tuple(Leg(**leg) for leg in legs))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Length:
    """How long a run is, as its folder notes it and its job asks for now. most_units: of the teacher's answers that so many steps can draw from."""
    job: DistillJob
    files: RunFolder
    most_units: Callable[[int], int]

    def noted(self) -> Course | None:
        noted = self.files.noted("legs")
        return None if noted is None else Course.from_json(noted)

    def course(self) -> Course | None:
        """The legs of this run, with another one where it is asked for more; None before the first session has come to its steps."""
        course = self.noted()
        if course is None or (wanted := self.wanted(course)) <= course.total:
            return course
        ended = self.files.noted("finished")
        early = ended is not None and ended["step"] == self.done() and ended["step"] < course.total       # and not gone on since
        course = course.extended(wanted, self.most_units(wanted), self.job.recipe.evaluations, ended["step"] if early else None)
        self.files.note("legs", course.to_json())
        return course

    def begin(self, units: int, speed: Speed | None) -> Course:
        """The first leg. speed: what was measured, where there are minutes."""
        if speed is not None:
            self.files.note("speed", asdict(speed))
        course = Course.begin(self.job.steps if speed is None else speed.steps(self.job.minutes), units, self.job.recipe.evaluations)
        self.files.note("legs", course.to_json())
        return course

    def wanted(self, course: Course) -> int:
        """Steps that the job asks for now: those of its course, where minutes cannot be told in steps; none where it is only prepared."""
        if self.job.steps or self.job.minutes == 0:
            return self.job.steps
        speed = self.files.noted("speed")
        if speed is None and (rows := self.files.rows("step")):          # it was begun by steps
            speed = {"seconds": max(1e-6, statistics.median(row["seconds"] for row in rows)), "before": 0.0}
            self.files.note("speed", speed)
        return course.total if speed is None else Speed(**speed).steps(self.job.minutes)

    def last(self, course: Course, step: int) -> int:
        """The step to end at, of a run that has come to `step`: an evaluation before the course's end, where less is asked for than it was begun for."""
        wanted = self.wanted(course)
        last = course.total if wanted >= course.total else course.next_evaluation(max(wanted, step))
        self.files.note("last", last)
        return last

    def done(self) -> int:
        """Steps that the log tells of."""
        return max((row["step"] for row in self.files.rows("step")[-1:]), default=0)

    def evaluations_to_come(self, course: Course | None) -> int:
        """Evaluations, by the course; as many as the job asks for before there is one."""
        return self.job.recipe.evaluations if course is None else sum(map(course.due, range(self.done() + 1, course.total + 1)))

    def to_come(self, course: Course | None) -> int:
        """Steps, by what was asked for; 0 where minutes are still to be turned into steps."""
        return max(0, (course.total if course else self.job.steps) - self.done())
