"""The jobs that run in this process, and what is asked of them from outside the thread they run in."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Job:
    """One run of a node. It has flags of its own, so that what is asked of it can never reach the node's next run.

    trains: it has trained at least a step; before that there is nothing to finish. finish: it was asked to end with its best.
    """
    trains: bool = False
    finish: bool = False


_running: dict[str | None, Job] = {}


@contextmanager
def running(node_id: str | None) -> Iterator[Job]:
    """The job that runs at this node, for as long as it does."""
    job = _running[node_id] = Job()
    try:
        yield job
    finally:
        del _running[node_id]


def finish(node_id: str) -> bool:
    """Asks the job that trains at this node now to end with its best student so far; False when none does."""
    job = _running.get(node_id)
    if job is None or not job.trains:
        return False
    job.finish = True
    return True
