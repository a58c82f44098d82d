"""One case: what is spoiled, how, by whom it is read, and what came of it. And the process that tries one after the other."""
from __future__ import annotations

import logging
import random
import re
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from wanlite_model.errors import WanLiteError

from . import containers, packed, places, tensors, texts  # noqa: F401 - each adds its mutations
from .guard import Guard, limit_memory, snapshot
from .mutation import MUTATIONS, Mutation
from .originals import Place, copied
from .targets import TARGETS, Target, Wrong

REFUSED, RIGHT = "refused", "right"
LONGEST = 4000                          # characters that a user reads: a predecessor's config is told field by field
STRANGE = re.compile(r"Traceback|File \"|[\x00-\x09\x0b-\x1f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Which case of a seed: the same again in any process."""
    number: int
    seed: int

    def drawn(self, targets: tuple[Target, ...] = TARGETS) -> tuple[random.Random, Mutation, str, Target]:
        """(how it goes on, the mutation, the kind of original, who reads it). Each mutation comes up in turn."""
        order = random.Random(self.seed).sample(MUTATIONS, len(MUTATIONS))      # nosec B311  # drawn alike in every process
        draw = random.Random(f"{self.seed} {self.number}")                      # nosec B311  # the same
        mutation = order[self.number % len(order)]
        kind = draw.choice(mutation.kinds)
        # Of its own: with or without ComfyUI the same is spoiled.
        reader = random.Random(f"{self.seed} {self.number} reader")             # nosec B311  # the same
        return draw, mutation, kind, reader.choice([target for target in targets if kind in target.kinds])


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """ended: "refused", "right", or what is wrong in a few words. told: the sentence, or more about it."""
    ended: str
    told: str
    seconds: float = 0.0


class Reader:
    """Tries cases in this process, which is watched from now on. errors: those that are sentences."""

    def __init__(self, home: Path, targets: tuple[Target, ...], errors: tuple[type[Exception], ...], *own: Path) -> None:
        self.home, self.targets, self.errors = home, targets, errors
        logging.disable()
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        self.guard = Guard(home, *own)
        limit_memory()

    def spoiled(self, case: Case) -> tuple[Place, Target]:
        draw, mutation, kind, target = case.drawn(self.targets)
        place = copied(self.home, kind)
        mutation.spoil(draw, place)
        return place, target

    def tried(self, place: Place, target: Target) -> Outcome:
        before, begun = self._snapshot(target), time.process_time()
        found = None
        try:
            with self.guard.armed(target.writes):
                found = target.read(place.path)
            outcome = None
        except self.errors as error:
            outcome = told_well(str(error))
        except BaseException as error:
            outcome = Outcome(ended=f"raised {type(error).__name__}", told=where(error))
        seconds = time.process_time() - begun
        if outcome is None:
            outcome = checked(target, place, found)
        elif place.same and outcome.ended == REFUSED:
            outcome = Outcome(ended="refused what is whole", told=outcome.told)
        if self.guard.seen:
            outcome = Outcome(ended="did what it may not", told="; ".join(dict.fromkeys(self.guard.seen)))
        elif self._snapshot(target) != before:
            outcome = Outcome(ended="changed files", told=", ".join(sorted(name for name, _ in before.items() ^ self._snapshot(target).items())))
        return Outcome(ended=outcome.ended, told=outcome.told, seconds=seconds)

    def _snapshot(self, target: Target) -> dict[str, tuple[int, ...]]:
        return snapshot(self.home / "outside" if target.writes else self.home)


def told_well(text: str) -> Outcome:
    """Whether it is a sentence that can be shown."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Outcome(ended="a sentence that cannot be written", told=ascii(text))
    if not text.endswith(".") or len(text) > LONGEST or STRANGE.search(text):
        return Outcome(ended="a poor sentence", told=f"{text[:LONGEST]!r} ({len(text)} characters)")
    return Outcome(ended=REFUSED, told=text)


def checked(target: Target, place: Place, found: object) -> Outcome:
    try:
        target.check(place, found)
    except Wrong as wrong:
        return Outcome(ended="read wrongly", told=str(wrong))
    except Exception as error:
        return Outcome(ended=f"gave what raises {type(error).__name__}", told=where(error))
    return Outcome(ended=RIGHT, told="")


def where(error: BaseException) -> str:
    """The error, and the last lines of the call."""
    frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return f"{ascii(str(error)):.300} at {' '.join(frames[-4:])}"


def serve(connection: Connection, home: Path, seed: int, comfyui: Path | None) -> None:
    """Answers to each number with what is tried, and then with its outcome; until it is told None."""
    targets, errors = TARGETS, (WanLiteError,)
    if comfyui is not None:
        from .comfy_target import comfy_target
        target, error = comfy_target(comfyui)
        targets, errors = (*TARGETS, target), (WanLiteError, error)
    reader = Reader(home, targets, errors, *([comfyui] if comfyui else []))
    sys.setrecursionlimit(1000)
    while (number := connection.recv()) is not None:
        place, target = reader.spoiled(Case(number=number, seed=seed))
        connection.send((place.kind, target.name))
        connection.send(reader.tried(place, target))
