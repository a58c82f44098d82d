"""What earlier jobs left on disk, cleared by a limit: the teacher's answers that were used longest ago go first, and the runs that ended longest ago."""
from __future__ import annotations

import logging
import os
import shutil
import stat
import uuid
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import TEMPORARY, patiently, sweep

log = logging.getLogger(__name__)

JOBS = ".jobs"                  # of a cache: a lock for each job that uses it now
LOCK, JOB = ".lock", "job.json"        # of a run's folder


@contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """While inside, other jobs clear nothing from this cache."""
    (cache / JOBS).mkdir(parents=True, exist_ok=True)
    mine = cache / JOBS / f"{uuid.uuid4().hex[:12]}.lock"
    lock = FileLock(mine)
    lock.acquire()
    try:
        if not others_work(cache):
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
    if others_work(cache):
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
    sizes = {path: size_of(path) for path in found_runs(runs)}
    excess, freed = sum(sizes.values()) + to_come - limit, 0
    for path in sorted(sizes, key=lambda path: (path / JOB).stat().st_mtime_ns):
        if freed >= excess or any(one.is_relative_to(path.absolute()) for one in kept) or not remove_run(path):
            continue
        freed += sizes[path]
        log.warning("WanLite: run %s was removed (%.1f GiB): runs take more than their limit of %.1f GiB.", path.name, sizes[path] / 2**30, limit / 2**30)
    return freed


def found_runs(runs: Path) -> list[Path]:
    """The folders of runs, by their names; what is hidden is on its way out."""
    return [path for path in entries(runs) if not path.name.startswith(".") and not is_link(path) and (path / JOB).is_file()]


def is_used(run: Path) -> bool:
    """Whether a job works in it now, in this process or in another one."""
    try:
        with FileLock(run / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def remove_run(run: Path) -> bool:
    """Removes a run; False when a job works in it, or the system does not let it go, and then it is whole."""
    try:
        with FileLock(run / LOCK, timeout=0):
            if os.name != "nt":
                remove_folder(run)
        if os.name == "nt":         # which moves no folder in which a file is open: its lock is one, and so would a job's be
            remove_folder(run)
        return True
    except (Timeout, OSError):
        return False


def remove_folder(folder: Path) -> None:
    """Removes a folder so that it is whole under its name, or not there, whenever the process ends. Raises OSError when it cannot be moved."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    patiently(os.rename, folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, by its name; nothing where there is none."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def is_link(path: Path) -> bool:
    """Whether it stands for something elsewhere: a symbolic link, or a junction of Windows."""
    try:
        told = path.lstat()
    except OSError:
        return False
    return stat.S_ISLNK(told.st_mode) or getattr(told, "st_reparse_tag", 0) == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)


def files_in(place: Path) -> Iterator[Path]:
    """The file that it is, or all in it; links are among them, and what they stand for is not."""
    if is_link(place) or not place.is_dir():
        yield place
        return
    for path in entries(place):
        yield from files_in(path)


def size_of(place: Path, links: Counter[tuple[int, int]] | None = None) -> int:
    """Bytes that its removal frees. A file under several names frees them with the last of these. links: names that were met elsewhere before."""
    links, size = Counter() if links is None else links, 0
    for path in files_in(place):
        with suppress(OSError):             # it was removed just now
            told = path.lstat()
            links[told.st_dev, told.st_ino] += 1
            if links[told.st_dev, told.st_ino] == max(1, told.st_nlink):
                size += told.st_size
    return size


def others_work(cache: Path) -> int:
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

