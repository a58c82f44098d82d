"""How good the students are: `python -m benchmarks.quality [--quick | --full]` from the repository's root, one table.

--quick: one seed, 64 videos a row, a taste of training. Default: one seed, 256 videos, baselines and presets. --full: three seeds, 1,024
videos, more training, ablations (256 videos each: their errors decide), a second world that nothing was tuned on, and the first one's teacher
changed; on a GPU, or overnight. --rows names some rows alone.
What was trained and measured stays in output/benchmarks/quality: the same command goes on where it was stopped.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace

import torch

from demo.comfy_path import ROOT

from . import work
from ..swapped import SWAPPED
from ..teachers import WORLDS
from .rows import LONG, QUICK, SHORT, Budget, Row, ablations, chosen, moved, rows
from .table import table
from .task import FIRST, Task

HOME = ROOT / "output" / "benchmarks" / "quality"
SECONDS = 5             # between looks at whether another row may begin
ABLATION_VIDEOS = 256
QUICK_ROWS = ("teacher", "teacher, 4 steps", "plain cut", "no-cfg", "slim", "few-step 4")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is measured."""
    name: str
    videos: int
    seeds: int
    budget: Budget
    worlds: tuple[str, ...] = ("balls",)

    def videos_of(self, row: Row) -> int:
        return min(self.videos, ABLATION_VIDEOS) if row.kind == "ablation" else self.videos

    def rows(self, world: str) -> tuple[Row, ...]:
        """All that there is of a world at this size."""
        if world == SWAPPED.name:
            return moved(self.budget)
        return (*rows(self.budget), *(ablations() if self.name == "full" else ()))


QUICK_SIZE = Size(name="quick", videos=64, seeds=1, budget=QUICK)
DEFAULT_SIZE = Size(name="default", videos=256, seeds=1, budget=SHORT)
FULL_SIZE = Size(name="full", videos=1024, seeds=3, budget=LONG, worlds=tuple(WORLDS))


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
    known = {row.name for world in of.worlds for row in of.rows(world)}
    if unknown := set(given.rows or ()) - known:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}")
    begun = time.monotonic()
    tasks = [Task(row=row, world=world, seed=seed, videos=of.videos_of(row), home=HOME / of.name) for seed in range(of.seeds) for world in of.worlds
             for row in wanted(of, world, given.rows or (QUICK_ROWS if given.quick else None)) if seed == 0 or row.recipe is not None]
    measure([*tasks, *sources(tasks, of)], given.device)
    seconds = work.timed([task for task in tasks if task.seed == 0])
    for world in of.worlds:
        mine = [task for task in tasks if task.world == world]
        print(f"\n{world}, {of.seeds} seed{'s' * (of.seeds > 1)}, {of.videos} videos a row and seed (ablations {min(of.videos, ABLATION_VIDEOS)}), {given.device}\n")
        print(table([(task.row, {**task.result(), **({"seconds": seconds[task]} if task in seconds else {})}) for task in mine]))
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes")


def wanted(of: Size, world: str, names: Sequence[str] | None) -> tuple[Row, ...]:
    """The world's rows of these names with what they need, or all of them."""
    everything = of.rows(world)
    return everything if names is None else chosen([name for name in names if name in {row.name for row in everything}], everything)


def sources(tasks: Sequence[Task], of: Size) -> list[Task]:
    """What must be trained in the first world for rows of another one that begin with its LoRA."""
    table = {row.name: row for row in of.rows(FIRST)}
    needed = {replace(task, world=FIRST, row=table[task.row.lora_of]) for task in tasks if task.row.lora_of}
    return sorted(needed - set(tasks), key=lambda task: task.seed)


def unsettled(tasks: Sequence[Task]) -> list[Task]:
    """Those without a result, and those that begin with what one of them is to end with."""
    found = [task for task in tasks if task.result() is None]
    while more := [task for task in tasks if task not in found and {other.folder for other in found} & set(task.needs)]:
        found += more
    return found


def measure(tasks: list[Task], device: str) -> None:
    """Runs what has no result yet, as many at a time as there are cores (one on a GPU), each after what it needs. What is only sampled comes
    last: it fills the gaps while one training waits for another.
    """
    todo = sorted(unsettled(tasks), key=lambda task: task.row.recipe is None)
    workers = (os.cpu_count() or 1) if device == "cpu" else 1
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        work.prepare(tasks, device, pool)
        running: dict[Future, Task] = {}
        filled = {None, *(task.cache for task in tasks if task not in todo)}
        while todo or running:
            waiting = {task.folder for task in (*todo, *running.values())}
            for task in list(todo):
                filling = {other.cache for other in running.values() if not other.has_asked} - filled
                if len(running) < workers and not waiting & set(task.needs) and task.cache not in filling:     # nobody asks for what another asks for now
                    todo.remove(task)
                    running[pool.submit(work.settle, task, device)] = task
            for done in wait(running, timeout=SECONDS, return_when=FIRST_COMPLETED).done:
                task, scores = running.pop(done), done.result()
                filled.add(task.cache)
                print(f"{time.strftime('%H:%M:%S')} {task.world} {task.seed} {task.row.name}: {scores['right']} of {scores['videos']} right, "
                      f"error {scores['error']:.4f}, {scores['train seconds']:.0f} s of training", flush=True)


if __name__ == "__main__":
    main()
