"""How good the students are: `python -m benchmarks.quality [--quick | --full]` from the repository's root, one table.

--quick: one seed, 64 videos a row, a taste of training. Default: one seed, 256 videos, baselines and presets. --full: three seeds, 1,024
videos, ablations, and a second world that nothing was tuned on; overnight on a CPU, or on a GPU. --rows names some rows alone.
What was trained and measured stays in output/benchmarks/quality: the same command goes on where it was stopped.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace

import torch

from demo.comfy_path import ROOT

from . import work
from .rows import STEPS, ablations, chosen, rows
from .table import table
from .task import Task

HOME = ROOT / "output" / "benchmarks" / "quality"
QUICK = ("teacher", "teacher, 4 steps", "plain cut", "no-cfg", "slim", "few-step 4")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is measured."""
    videos: int
    seeds: int
    training: int
    worlds: tuple[str, ...] = ("balls",)


QUICK_SIZE, DEFAULT_SIZE = Size(videos=64, seeds=1, training=120), Size(videos=256, seeds=1, training=STEPS)
FULL_SIZE = Size(videos=1024, seeds=3, training=STEPS, worlds=("balls", "bars"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="at most five minutes on two CPU cores")
    size.add_argument("--full", action="store_true", help="everything; hours")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these rows and what they need")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--worlds", nargs="+", choices=FULL_SIZE.worlds)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    of = QUICK_SIZE if given.quick else FULL_SIZE if given.full else DEFAULT_SIZE
    of = replace(of, **{name: tuple(value) if isinstance(value, list) else value
                        for name in ("seeds", "worlds") if (value := getattr(given, name)) is not None})
    everything = (*rows(of.training), *ablations(of.training))
    names = given.rows or (QUICK if given.quick else [row.name for row in (everything if given.full else rows(of.training))])
    begun = time.monotonic()
    home = HOME / ("quick" if given.quick else "whole")
    tasks = [Task(row=row, world=world, seed=seed, videos=of.videos, home=home) for world in of.worlds for seed in range(of.seeds)
             for row in chosen(names, everything) if seed == 0 or row.recipe is not None]
    measure(tasks, given.device)
    for world in of.worlds:
        mine = [task for task in tasks if task.world == world]
        print(f"\n{world}, {of.seeds} seed{'s' * (of.seeds > 1)}, {of.videos} videos a row and seed, {given.device}\n")
        print(table([(task.row, task.result()) for task in mine]))
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes")


def measure(tasks: list[Task], device: str) -> None:
    """Runs what has no result yet, as many at a time as there are cores (one on a GPU), each after what it needs; then times all in turn."""
    work.prepare(tasks, device)
    todo = [task for task in tasks if task.result() is None]
    workers = max(1, min(len(todo), os.cpu_count() or 1)) if device == "cpu" else 1
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future, Task] = {}
        while todo or running:
            waiting = {task.folder for task in (*todo, *running.values())}
            for task in [task for task in todo if not any(task.folder_of(name) in waiting for name in task.row.needs)]:
                todo.remove(task)
                running[pool.submit(work.settle, task, device)] = task
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                task, scores = running.pop(done), done.result()
                print(f"{time.strftime('%H:%M:%S')} {task.world} {task.seed} {task.row.name}: {scores['right']} of {scores['videos']} right, "
                      f"error {scores['error']:.4f}, {scores['train seconds']:.0f} s of training", flush=True)
    work.time_all(tasks)


if __name__ == "__main__":
    main()
