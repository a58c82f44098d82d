"""What spoiled files and configs do to their readers: `python -m benchmarks.fuzz [--cases 2000] [--seed 0] [--case N]` from the repository's root.

Each case takes something whole (a WAN in four layouts, a LoRA, a prompt bank, a config, a job, a note about a student, a run's folder, a start), spoils it in
one way and has one of its readers open it, in a process of its own that is watched. It must end in a sentence, or in exactly what is there. Prints one table,
and every case that ended otherwise with its number, by which `--case` tries it again. With a ComfyUI at hand its own loader is one of the readers.
Exit status 1 when there was one.
"""
from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from run import SetupError, find_comfyui

from .case import REFUSED, RIGHT, Case, Outcome, serve
from .guard import MEMORY
from .mutation import Mutation
from .originals import made

LONGEST = 5.0           # seconds that a case may compute
PATIENCE = 30.0         # and be waited for: other programs may have the cores
START = 300.0           # and its process, to be there


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A case, what was read by whom, and what came of it."""
    case: Case
    kind: str
    reader: str
    outcome: Outcome

    @property
    def mutation(self) -> Mutation:
        return self.case.drawn()[1]

    @property
    def wrong(self) -> bool:
        return self.outcome.ended not in (REFUSED, RIGHT)

    def told(self) -> str:
        return f"case {self.case.number}: {self.reader} of a {self.kind} with {self.mutation.name}: {self.outcome.ended}. {self.outcome.told}"


class Process:
    """The one that tries cases now; another takes its place when it dies or hangs."""

    def __init__(self, home: Path, seed: int, comfyui: Path | None = None, served: Callable[[Connection, Path, int, Path | None], None] = serve) -> None:
        self._served, self._given, self._child = served, (home, seed, comfyui), None
        self.seed = seed

    def tried(self, number: int) -> Tried:
        case = Case(number=number, seed=self.seed)
        if self._child is None:
            self._start()
        self._connection.send(number)
        kind, reader = self._answer(START)
        try:
            outcome = self._answer(PATIENCE)
            if outcome.seconds > LONGEST:
                outcome = replace(outcome, ended="took too long", told=f"{outcome.seconds:.1f} seconds")
        except EOFError:
            self._child.join()
            outcome = Outcome(ended="crashed", told=f"exit status {self._child.exitcode}")
            self.close()
        except TimeoutError:
            outcome = Outcome(ended="hung", told=f"for {PATIENCE:.0f} seconds", seconds=PATIENCE)
            self.close()
        return Tried(case=case, kind=kind, reader=reader, outcome=outcome)

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._connection.close()
            self._child = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._child = context.Process(target=self._served, args=(theirs, *self._given), daemon=True)
        self._child.start()
        theirs.close()

    def _answer(self, patience: float) -> object:
        if not self._connection.poll(patience):
            raise TimeoutError
        return self._connection.recv()


def tried(numbers: Iterable[int], seed: int, comfyui: Path | None = None) -> Iterator[Tried]:
    """Each case of these numbers as soon as it is done."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        made(Path(home))
        process = Process(Path(home), seed, comfyui)
        try:
            yield from map(process.tried, numbers)
        finally:
            process.close()


def table(done: Sequence[Tried]) -> str:
    lines = ["| what is wrong | cases | refused in a sentence | read as it is | anything else | slowest |", "|---|---|---|---|---|---|"]
    for family in [*sorted({one.mutation.family for one in done}), None]:
        mine = [one for one in done if family in (one.mutation.family, None)]
        ended = [one.outcome.ended for one in mine]
        lines.append(f"| {family or 'all'} | {len(mine)} | {ended.count(REFUSED)} | {ended.count(RIGHT)} | {sum(one.wrong for one in mine)} | "
                     f"{max((one.outcome.seconds for one in mine), default=0):.2f} s |")
    return "\n".join(lines)


def comfyui_at_hand() -> Path | None:
    try:
        return find_comfyui()
    except SetupError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--without-comfyui", action="store_true", help="its loader reads nothing; the cases are the same, their readers are drawn anew")
    given, begun = parser.parse_args(), time.monotonic()
    comfyui = None if given.without_comfyui else comfyui_at_hand()
    done = []
    for one in tried(range(given.cases) if given.case is None else [given.case], given.seed, comfyui):
        done.append(one)
        if one.wrong:
            sys.stderr.write(f"{one.told()}\n")
    wrong = [one for one in done if one.wrong]
    readers = sorted({one.reader for one in done})
    sentences = len({one.outcome.told for one in done if one.outcome.ended == REFUSED})
    print(table(done),
          f"\nSeed {given.seed}, {time.monotonic() - begun:.0f} seconds. Read by {', '.join(readers)}. {sentences} different sentences. No case had more than "
          f"{LONGEST:.0f} seconds, nor {MEMORY // 2**20} MiB beyond what its process had.", *(one.told() for one in wrong), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
