"""The jobs that run in this process, and what is asked of them from outside the thread they run in."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:               # ComfyUI imports this when it starts
    from .live import Live


@dataclass(eq=False)
class Job:
    """One run of a node. It has flags of its own, so that what is asked of it can never reach the node's next run.

    trains: it has trained at least a step; before that there is nothing to finish. finish: it was asked to end with its best.
    """
    live: Live
    trains: bool = False
    finish: bool = False


_running: dict[str, Job] = {}           # by the name of the run


@contextmanager
def running(run: str, live: Live) -> Iterator[Job]:
    """The job that works on this run, for as long as it does."""
    job = _running[run] = Job(live)
    try:
        yield job
    finally:
        del _running[run]


def finish(run: str) -> bool:
    """Asks the job that trains this run now to end with its best student so far; False when none does."""
    job = _running.get(run)
    if job is None or not job.trains:
        return False
    job.finish = True
    return True


def live(run: str) -> Live | None:
    """What is known of this run, where a job works on it now."""
    job = _running.get(run)
    return None if job is None else job.live


def run_at(nodes: list[str]) -> str | None:
    """The name of the run that works at one of these nodes now."""
    return next((run for run, job in list(_running.items()) if job.live.node in nodes), None)
