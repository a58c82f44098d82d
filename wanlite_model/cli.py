"""Runs without ComfyUI: `python -m wanlite_model run <folder>`, on this machine or on another one.

Standard output gets one line of JSON for each step, evaluation, checkpoint and stage; standard error a progress bar and, when it cannot go
on, a sentence. Exit status: 0 finished; 1 it cannot go on; 2 the command is wrong; 128 + n stopped by signal n, and it goes on from there.
"""
from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .awake import awake
from .distill import inputs
from .distill.asking import fill
from .distill.checkpoint import RunFolder
from .distill.events import Eval, Event, Finished, Planned, Saved, Stage, Step
from .distill.job import DistillJob
from .distill.trainer import run
from .errors import WanLiteError

FAILED, STOPPED = 1, 128
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    try:
        with _signals() as received:
            return _command(given, received)
    except WanLiteError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wanlite_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("folder", type=Path, help="a run's folder, below output/wanlite/runs")
    shared.add_argument("--teacher", type=Path, help="the WAN file or folder that the run's teacher was opened from; one that lies in the run's folder is found")
    shared.add_argument("--other", type=Path, help="the same of the other expert, for a run on one of 2.2's two")
    shared.add_argument("--cache", type=Path, help="where the teacher's answers are, when they were moved")
    shared.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu, ... (here: %(default)s)")
    going = commands.add_parser("run", parents=[shared], help="go on with a run, to its end")
    length = going.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="in place of the length that the run was queued with")
    length.add_argument("--minutes", type=float, help="the same in minutes of the whole job")
    filling = commands.add_parser("cache", parents=[shared], help="ask the teacher all that a run with a number of steps asks it, and stop")
    filling.add_argument("--steps", type=int, help="that the answers are for; by default those that the run was queued with")
    filling.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="only the I-th of N parts, I from 1 on: N of them can run at once")
    return parser


def _shard(text: str) -> tuple[int, int]:
    try:
        number, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 1/4") from None
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: I runs from 1 to N")
    return number - 1, count


def _command(given: argparse.Namespace, received: list[int]) -> int:
    files = RunFolder(given.folder)
    job = _lengthened(inputs.job_of(files), given)
    parts, device = inputs.read(files), torch.device(given.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    teacher = inputs.teacher_of(files, job, device, given.teacher)
    other = inputs.teacher_of(files, job, device, given.other, inputs.OTHER) if job.role else None
    cache = given.cache or inputs.cache_of(files)
    if given.command == "cache":
        work = fill(job, cache, teacher, parts, given.shard, other)
    else:
        work = run(job, files.path, cache, teacher, parts.student, parts.prompts, parts.latents, start_from=parts.start_from, other=other)
    with awake(f"Run {files.path.name}"), closing(work), _Shown() as shown:
        for event in work:
            shown(event)
            if received:
                break
    return STOPPED + received[0] if received else 0


def _lengthened(job: DistillJob, given: argparse.Namespace) -> DistillJob:
    if given.steps is not None:
        job = replace(job, steps=given.steps)
    elif given.command == "run" and given.minutes is not None:
        job = replace(job, steps=0, minutes=given.minutes)
    if job.steps == 0 and (job.minutes == 0 or given.command == "cache"):
        raise WanLiteError("The run was prepared without a length." if given.command == "run" else "How many answers minutes allow shows when they are asked for.",
                           "", "Say --steps" + (" or --minutes." if given.command == "run" else "."))
    return job


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that have come: the first is for the loop to see, which saves; a second one ends the process as it would have."""
    received: list[int] = []
    former = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, former[number])

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number in SIGNALS:
            signal.signal(number, former[number])


class _Shown:
    """Events as lines of JSON, and as a bar."""

    def __init__(self) -> None:
        self._stage, self._bar = "", None

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stage):
            if event.name != self._stage:
                self._say(stage=event.name, total=event.total)
            self._show(event.name, event.done, event.total)
        elif isinstance(event, Planned):
            self._say(planned=event.told)
        elif isinstance(event, Step):
            self._say(step=event.step, total=event.total, loss=event.loss, grad_norm=event.grad_norm, lr=event.lr, seconds=event.seconds)
            self._show("training", event.step, event.total)
        elif isinstance(event, Eval):
            self._say(evaluated=event.step, error=event.held.error, to_compare=event.plain_cut.error, best=event.best)
        elif isinstance(event, Saved):
            self._say(saved=event.step, bytes=event.bytes)
        elif isinstance(event, Finished):
            self._say(finished=event.handle.loras[-1] if event.handle.loras else event.handle.folder, report=event.report)

    def _say(self, **told: Any) -> None:
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()

    def _show(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm
        if stage != self._stage:
            self.__exit__()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, file=sys.stderr, dynamic_ncols=True)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
