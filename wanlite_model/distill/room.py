"""What earlier jobs left on disk, cleared by a limit: the teacher's answers that were used longest ago go first, and the runs that ended longest ago."""
from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import sweep

log = logging.getLogger(__name__)

JOBS = ".jobs"                  # of a cache: a lock for each job that uses it now
LOCK = ".lock"                  # of a run's folder


@contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """While inside, other jobs clear nothing from this cache."""
    (cache / JOBS).mkdir(parents=True, exist_ok=True)
    mine = cache / JOBS / f"{uuid.uuid4().hex[:12]}.lock"
    lock = FileLock(mine)
    lock.acquire()
    try:
        if not _others_work(cache):
            sweep(cache)            # what a killed process left half-written
        yield
    finally:
        lock.release()
        with suppress(OSError):
            mine.unlink()


def touch(units: Collection[Path]) -> None:
    """Notes that these answers are used."""
    for unit in units:
        with suppress(OSError):
            os.utime(unit)


def clear_cache(cache: Path, limit: int, keep: Collection[Path], to_come: int) -> int:
    """Removes answers that are not among `keep`, those used longest ago first, until all of them, with `to_come` bytes more, take no more than
    `limit` bytes; returns how many bytes were freed. Nothing is removed while another job uses the cache.
    """
    found = {path: path.stat() for path in cache.glob("*.safetensors")}
    excess = sum(stat.st_size for stat in found.values()) + to_come - limit
    others = sorted((path for path in found if path not in keep), key=lambda path: found[path].st_mtime_ns)
    if excess <= 0 or not others:
        return 0
    if _others_work(cache):
        log.warning("WanLite: the teacher's answers take more than their limit, and none are removed while another job uses them.")
        return 0
    freed = 0
    for path in others:
        if freed >= excess:
            break
        with suppress(OSError):             # Windows keeps what is open
            path.unlink()
            freed += found[path].st_size
    log.warning("WanLite: %.1f GiB of the teacher's answers to earlier jobs were removed: the limit is %.1f GiB.", freed / 2**30, limit / 2**30)
    return freed


def clear_runs(runs: Path, limit: int, keep: Collection[Path], to_come: int) -> int:
    """The same of run folders, but for those in which one of `keep` lies: of those that no job works in, the one that was written to longest ago goes
    first.
    """
    kept = {Path(path).absolute() for path in keep}
    sizes = {path: _size(path) for path in runs.iterdir() if (path / "job.json").is_file()}
    excess, freed = sum(sizes.values()) + to_come - limit, 0
    for path in sorted(sizes, key=lambda path: (path / "job.json").stat().st_mtime_ns):
        if freed >= excess or any(one.is_relative_to(path.absolute()) for one in kept):
            continue
        try:
            with FileLock(path / LOCK, timeout=0):
                shutil.rmtree(path, ignore_errors=True)
        except (Timeout, OSError):
            continue
        shutil.rmtree(path, ignore_errors=True)         # the lock too, which Windows keeps until it is released
        freed += sizes[path]
        log.warning("WanLite: run %s was removed (%.1f GiB): runs take more than their limit of %.1f GiB.", path.name, sizes[path] / 2**30, limit / 2**30)
    return freed


def _others_work(cache: Path) -> int:
    """How many jobs beside this one hold a lock; what killed ones left is removed."""
    busy = 0
    for path in (cache / JOBS).glob("*.lock"):
        try:
            with FileLock(path, timeout=0):
                pass
            with suppress(OSError):
                path.unlink()
        except (Timeout, OSError):
            busy += 1
    return max(0, busy - 1)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
