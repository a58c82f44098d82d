"""What jobs leave on disk and none works on now: how much it is, and its removal.

Only what WanLite made, known by its names; never through a link, and never a folder in which something else lies. Where the places themselves
are is their owner's choice: these may be links.
"""
from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout

from ..compress.build import NOTE, starts_lock
from ..errors import WanLiteError
from ..files import read_json
from ..formats.card import StudentCard
from ..formats.saving import carries, head_of
from .room import JOB, entries, files_in, found_runs, in_use, is_link, is_used, others_work, remove_folder, remove_run, size_of

MODEL = r"(config\.json|diffusion_model\.safetensors|diffusion_pytorch_model\.safetensors(\.index\.json)?|[^/]+\.workflow\.json)"
# What a killed job left half-written, and what a system puts into every folder that somebody looks at.
ANYWHERE = r"(.+/)?(\.[^/]+\.tmp|\.wanlite-tmp-[^/]+)(/.+)?|(.+/)?(\.DS_Store|Thumbs\.db|desktop\.ini)"
OF_RUN = re.compile(r"job\.json|metrics\.jsonl|\.lock|(checkpoint|best|prompts|latents|start_from|lora-\d+)\.safetensors|samples/step-\d+\.(webp|png)|"
                    rf"start/[^/]+\.(safetensors|gguf)|start/[^/]+/({MODEL}|README\.md|picture\.png)|(student-\d+|teacher|other)/{MODEL}|{ANYWHERE}")
OF_START = re.compile(rf"{re.escape(NOTE)}|{MODEL}|{ANYWHERE}")
START, ANSWER = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{24}\.safetensors")
LEFT = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|\.[0-9a-f]{16}\.partial")        # beside these, of a removal or a write that was torn
COMPARED = "compare"            # of a cache: the teacher's clips of earlier comparisons


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The folders that jobs write to: one for each run, the teacher's answers, and students' starts."""
    runs: Path
    cache: Path
    starts: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """bytes: that clearing would free. count: of runs, answers or starts."""
    bytes: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What was not cleared, and a sentence why."""
    name: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleared:
    freed: int
    kept: tuple[Kept, ...]


def used(places: Places) -> dict[str, Used]:
    """What lies in each place. A file with names in two of them counts once."""
    links: Counter[tuple[int, int]] = Counter()
    found = {"runs": found_runs(places.runs), "cache": _answers(places.cache), "starts": _starts(places.starts)}
    left = {"runs": _left(places.runs), "cache": [path for shelf in _shelves(places.cache) for path in _left(shelf)], "starts": _left(places.starts)}
    return {name: Used(bytes=sum(size_of(path, links) for path in found[name] + left[name]), count=len(found[name])) for name in found}


def clear(places: Places, held: Callable[[Path], str] = lambda _: "") -> Cleared:
    """Removes runs, starts and answers that no job works on, in this process or in another one.

    held: a sentence where something else may still use this run or start, asked just before it would go. What a run that stays was made from stays.
    """
    work = _Clearing(held)
    kept = _clear_runs(work, places.runs)
    _clear_starts(work, places.starts, [path for run in kept for path in _students(run)])
    _clear_answers(work, places.cache)
    work.freed -= sum(size_of(path) for place in (places.runs, places.starts) for path in _left(place))         # still on its way out
    return Cleared(freed=max(0, work.freed), kept=tuple(work.kept))


def lost(runs: Path, saved: Iterable[Path], held: Callable[[Path], str] = lambda _: "") -> dict[str, list[str]]:
    """Names of the runs that hold work which is nowhere else, but for those that are `held` and stay.

    unsaved: they ended, and none of the files `saved` has their student's card. unfinished: they trained, and have not ended.
    """
    found: dict[str, list[str]] = {"unsaved": [], "unfinished": []}
    heads = [head for head in map(head_of, saved) if head]
    for run in found_runs(runs):
        if held(run):
            continue
        card = _ended_with(run)
        if card is None and any((run / name).is_file() for name in ("checkpoint.safetensors", "best.safetensors")):
            found["unfinished"].append(run.name)
        elif card is not None and not any(carries(head, card) for head in heads):
            found["unsaved"].append(run.name)
    return found


@dataclass
class _Clearing:
    """What was done so far."""
    held: Callable[[Path], str]
    freed: int = 0
    kept: list[Kept] = field(default_factory=list)

    def keep(self, name: str, why: str) -> None:
        self.kept.append(Kept(name=name, why=why))

    def remove(self, path: Path, remove: Callable[[Path], Any]) -> bool:
        """Whether it is gone, through us or through somebody who was faster."""
        size = size_of(path)
        with suppress(OSError):
            if remove(path) is not False:
                self.freed += size
        return not os.path.lexists(path)

    def sweep(self, place: Path) -> None:
        for path in _left(place):
            self.remove(path, Path.unlink if path.is_file() else shutil.rmtree)


def _clear_runs(work: _Clearing, runs: Path) -> list[Path]:
    """Returns those that stay."""
    found = found_runs(runs)
    kept = {run: why for run in found if (why := _why_kept(run) or work.held(run))}
    while more := {run: f"Run {user.name}, which stays, goes on from its student." for run in found if run not in kept
                   for user in kept if any(_within(path, run) for path in _students(user))}:
        kept |= more
    for run in found:
        if run in kept or (why := work.held(run)) or not work.remove(run, remove_run):
            work.keep(run.name, kept.setdefault(run, why or "A job has just begun to work on it, or the system does not let it go: on Windows a model that is "
                                                            "loaded from there keeps its files."))
    work.sweep(runs)
    return list(kept)


def _why_kept(run: Path) -> str:
    """A sentence, or nothing."""
    if "job" not in _noted(run):
        return f"Its {JOB} is not one of WanLite's."
    return "A job works on it now." if is_used(run) else _stranger(run, OF_RUN)


def _clear_starts(work: _Clearing, starts: Path, needed: list[Path]) -> None:
    if not starts.is_dir():
        return
    try:
        with starts_lock(starts).acquire(timeout=0):
            for start in _starts(starts):
                by_run = "A run that stays was made from it." if any(_within(path, start) for path in needed) else ""
                if why := by_run or _stranger(start, OF_START) or work.held(start):
                    work.keep(f"start {start.name}", why)
                elif not work.remove(start, remove_folder):
                    work.keep(f"start {start.name}", "The system does not let it go: on Windows a model that is loaded from there keeps its files.")
            work.sweep(starts)
    except Timeout:
        work.keep("starts", "One is being made now.")
    except OSError as error:
        work.keep("starts", f"Their folder cannot be written ({error.strerror or error}).")


def _clear_answers(work: _Clearing, cache: Path) -> None:
    if not cache.is_dir():
        return
    try:
        with in_use(cache):
            if others_work(cache):
                work.keep("answers", "A job uses them now.")
                return
            if stuck := [path for path in _answers(cache) if not work.remove(path, Path.unlink)]:
                work.keep("answers", f"The system does not let {len(stuck)} of them go.")
            for shelf in _shelves(cache):
                work.sweep(shelf)
    except OSError as error:
        work.keep("answers", f"Their folder cannot be written ({error.strerror or error}).")


def _starts(starts: Path) -> list[Path]:
    return [path for path in entries(starts) if START.fullmatch(path.name) and not is_link(path) and (path / NOTE).is_file()]


def _answers(cache: Path) -> list[Path]:
    """The teacher's answers, and its clips."""
    return [path for shelf in _shelves(cache) for path in entries(shelf) if ANSWER.fullmatch(path.name) and not is_link(path) and path.is_file()]


def _shelves(cache: Path) -> list[Path]:
    return [cache] if is_link(cache / COMPARED) else [cache, cache / COMPARED]


def _left(place: Path) -> list[Path]:
    """What was left on its way out, or half-written, beside those."""
    return [path for path in entries(place) if LEFT.fullmatch(path.name) and not is_link(path)]


def _stranger(folder: Path, known: re.Pattern[str]) -> str:
    """A sentence when something lies in the folder that WanLite did not put there, else nothing."""
    for path in files_in(folder):
        name = path.relative_to(folder).as_posix()
        if is_link(path) or not known.fullmatch(name):
            return f"{name} lies in it, which WanLite did not make: move it elsewhere."
    return ""


def _noted(run: Path) -> dict[str, Any]:
    """What its job.json says; of a damaged one, that there was a job."""
    try:
        noted = read_json(run / JOB)
    except (OSError, ValueError):
        return {"job": None}
    return noted if isinstance(noted, dict) else {}


def _students(run: Path) -> Iterator[Path]:
    """Where the student that it begins with lies, and the one that it ended with."""
    noted = _noted(run)
    with suppress(TypeError, KeyError, AttributeError):
        for told in (noted.get("student"), (noted.get("finished") or {}).get("handle")):
            if told:
                yield from map(Path, (told["folder"], *told["loras"]))


def _ended_with(run: Path) -> StudentCard | None:
    """The card of the student that the run ended with, or None while it has not."""
    try:
        return StudentCard.from_json(_noted(run)["finished"]["handle"]["card"])
    except (KeyError, TypeError, WanLiteError):
        return None


def _within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
