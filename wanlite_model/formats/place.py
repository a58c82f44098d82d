"""Putting something new on disk at once: built in a hidden place on the same disk, then moved; on failure nothing has changed."""
from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import WanLiteError
from ..files import patiently

log = logging.getLogger(__name__)

MAX_NAME = 200                          # bytes; leaves room for endings below the 255 of common file systems
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}    # Windows
PREFIX = ".wanlite-tmp-"
OLD = ".old"                            # what was moved aside
STALE = 24 * 3600                       # seconds after which a temporary folder belongs to a process that was killed
FULL = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}


def check_name(name: str, what: str = "a student") -> str:
    """The name again, when it can be a file's on every system. Raises WanLiteError otherwise; `what` says whose name it is."""
    wrong = re.search(r'[<>:"/\\|?*\x00-\x1f\x7f]', name)
    why = ("it is empty" if not name.strip() else
           f"it contains {wrong[0]!r}" if wrong else
           "it starts or ends with a space or a dot" if name.strip(" .") != name else
           "Windows keeps this name for a device" if name.split(".")[0].strip().lower() in DEVICES else
           f"it is longer than {MAX_NAME} bytes" if len(name.encode("utf-8", "replace")) > MAX_NAME else "")
    if why:
        raise WanLiteError(f"{name[:60]!r} cannot be {what}'s name: {why}.", "",
                           "Use letters, digits, spaces, - and _, for example 'cats-4steps'.")
    return name


@contextmanager
def temporary_place(destination: Path) -> Iterator[Path]:
    """An empty hidden folder on the disk of `destination`, gone afterwards.

    Where it can be, it stands beside the destination's folder and not in it, because ComfyUI lists what it finds there.
    """
    anchor = next(parent for parent in destination.parents if parent.exists())
    place = None
    for home in (anchor.parent if anchor == destination.parent else anchor, anchor):
        if home.stat().st_dev == anchor.stat().st_dev:
            try:
                _sweep(home)
                place = home / (PREFIX + uuid.uuid4().hex[:12])
                place.mkdir()                   # not mkdtemp: on Windows what it makes, and all in it, stays one user's own
                break
            except OSError:
                if home == anchor:
                    raise
    try:
        yield place
    finally:
        if any(place.glob("*" + OLD)):
            log.warning("What was to be overwritten is in %s.", place)
        else:
            shutil.rmtree(place, ignore_errors=True)


def put_in_place(moves: Sequence[tuple[Path, Path]], destination: Path) -> None:
    """Moves each (new, target). What stood at a target goes beside `new`; if any move fails, all are undone.

    Nothing is ever renamed over: Windows refuses that for a file some MODEL has mapped. Raises WanLiteError.
    """
    done: list[tuple[Path, Path]] = []
    try:
        for new, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            steps = [(new, target)]
            if os.path.lexists(target):
                steps.insert(0, (target, new.with_name(new.name + OLD)))
            for source, goal in steps:
                patiently(os.rename, source, goal)
                done.append((source, goal))
    except BaseException as error:
        _undo(done)
        if isinstance(error, PermissionError):
            raise WanLiteError(f"{destination.name} could not be put in place: the system does not allow it ({error.strerror}).",
                               "A model that is loaded from there keeps its file in use on Windows.",
                               "Unload it in ComfyUI or restart ComfyUI, or save under another name.") from error
        raise
    for _, aside in done:
        if aside.name.endswith(OLD):
            _remove(aside)


def _remove(aside: Path) -> None:
    """The new one is in place: what cannot be removed is left, and temporary_place says where."""
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _undo(done: Sequence[tuple[Path, Path]]) -> None:
    for source, goal in reversed(done):
        try:
            os.rename(goal, source)
        except OSError as error:
            raise WanLiteError(f"{source.name} could not be put in place, nor could all be moved back ({error.strerror}).",
                               f"Nothing is lost: it is in {goal}.", "Check the disk, then move it back by hand.") from error


def sentence_for(error: OSError, name: str) -> WanLiteError:
    """What a user reads when the disk refuses."""
    if error.errno in FULL:
        return WanLiteError(f"The disk became full while {name} was written.", "Nothing was saved and nothing was changed.",
                            "Free some space, or save in bfloat16, which takes half of float32.")
    return WanLiteError(f"{name} could not be written: {error.strerror or error}.", "Nothing was saved and nothing was changed.",
                        "Check that the folder can be written to.")


def _sweep(home: Path) -> None:
    """Removes what a killed process left, gigabytes perhaps; not what was moved aside: that is a user's older student."""
    for left in home.glob(PREFIX + "*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > STALE and not any(left.glob("*" + OLD)):
            shutil.rmtree(left, ignore_errors=True)
