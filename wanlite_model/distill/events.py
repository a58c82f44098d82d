"""What a running job tells. Nodes turn these into progress bars, a command line into text, a test into a list."""
from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ..compress.handle import StudentHandle
from .budget import Budget
from .evaluate import Held

Result = TypeVar("Result")

ASKING, EVALUATING, DRAWING = "asking the teacher", "evaluating", "drawing a sample"        # the stages that a clock counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage before or between the steps, at unit `done` of `total`."""
    name: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What the job will take and what is done so that it fits; once before its first step, and again when that turned out not to fit.

    steps: still to come; 0 where the minutes decide and are yet to be turned into steps. evaluations: the same of these.
    """
    budget: Budget
    told: str
    steps: int
    evaluations: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step, done. `step` counts from 1; loss is the batch's relative squared velocity error; seconds of this step."""
    step: int
    total: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Eval:
    """A held-out evaluation of the averaged weights after `step`, beside the plain cut's."""
    step: int
    held: Held
    plain_cut: Held
    best: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What the student draws for a held-out prompt after `step`, and what the teacher made of the same noise: [1, C, T, H, W] in processed space.

    teacher: None where the data are the user's clips.
    """
    step: int
    latents: Tensor
    teacher: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A complete checkpoint is on disk: a later run goes on from `step`."""
    step: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The end: the best student, written; a report in plain words; the losses of all steps and (step, error) of all evaluations.

    plain_cut: the error of what it is compared with, and yardstick: what that is.
    """
    handle: StudentHandle
    report: str
    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...]
    plain_cut: float
    yardstick: str


Event = Stage | Planned | Step | Eval | Sample | Saved | Finished


def staged(name: str, work: Generator[tuple[int, int], None, Result]) -> Generator[Stage, None, Result]:
    """The result of work that yields (done, of all)."""
    while True:
        try:
            done, total = next(work)
        except StopIteration as end:
            return end.value
        yield Stage(name=name, done=done, total=total)
