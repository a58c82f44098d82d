"""Whether a run that is killed at any moment loses anything: `python -m benchmarks.kills [--kills 20] [--seed 0]` from the repository's root.

One small job runs through a graph without a stop. The same job, in another folder and with a cache of its own, is killed (SIGKILL) over and over: while
the teacher is asked, while it trains and evaluates, and in the middle of writing each of its files. After each kill every file that is in place must
open whole, and the next session must go on from the newest checkpoint. At its end it must hold the same bits as the run without a stop.

The sessions come by two doors in turn: a real ComfyUI server with the graph queued, and `python -m wanlite_model run <folder>`. The kills before the first
step are all of the graph's: a teacher read from its file answers as ComfyUI's does but for the last bits, so a cache, and the errors that the start is
compared with, stay on the side that began them; later the command needs no teacher. Prints one table; exit status 1 when anything is wrong.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess  # nosec B404  # starts runs to kill them, without a shell
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.comfy_path import ROOT
from demo.comfy_server import ComfyServer, running_comfyui
from demo.graph import widgets
from run import PATIENT, find_comfyui
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.legs import Course
from wanlite_model.files import TEMPORARY
from wanlite_model.formats.place import PREFIX
from wanlite_model.prompts import PromptBank
from wanlite_model.transformer import WanLiteStudent

STEPS, SAVE_EVERY = 48, 0.1             # minutes: the fewest that a recipe may ask for
TEACHER, BANK, RUN = "kills-teacher.safetensors", "kills-bank.safetensors", "kills"
PATIENCE = 300                          # seconds that a moment may take to come
# What a session can be killed in: {name: seconds within which the kill comes once it is there}.
MOMENTS = {"asking the teacher": 2.0, "writing an answer": 0.0, "evaluating": 0.05, "training": 3.0, "writing checkpoint.safetensors": 0.1,
           "writing best.safetensors": 0.005, "writing job.json": 0.0, "writing the student": 0.01, "noting the end": 0.0}
CACHING, MIDDLE, END = tuple(MOMENTS)[:2], tuple(MOMENTS)[2:7], tuple(MOMENTS)[7:]
FEWEST = 11                             # kills that have each moment among them


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A process that works on the run, and the file that it talks into."""
    process: subprocess.Popen
    log: Path

    def announced(self) -> int:
        """The last step that it said to be saved; 0 without any. ComfyUI says nothing of that."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return max((json.loads(line)["saved"] for line in lines if line.startswith('{"saved"')), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """When: at a moment, once so many (answers, steps) are done, and `delay` seconds later."""
    moment: str
    after: tuple[int, int]
    delay: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a kill left. moment: where it hit. redone: steps that no checkpoint holds. unreadable: files. wrong: what must not be, in sentences."""
    moment: str
    redone: int
    unreadable: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """saved: the step that the checkpoint holds. steps: the logged ones."""
    saved: int
    steps: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A run as its files tell of it, by whatever door it is worked on. answers: of the teacher, that the whole job asks for.

    What a session does now is told by what it changed: `before` are the stamps from before it began.
    """
    folder: Path
    cache: Path
    answers: int

    def stamps(self) -> dict[str, int]:
        """{name: when it was changed, in ns} of what lies in the run's folder, beside it and in the cache."""
        return {path.name: _stamp(path) for path in self._entries()}

    def progress(self) -> Progress:
        with suppress(FileNotFoundError), safe_open(self.folder / "checkpoint.safetensors", "pt") as stored:
            return Progress(saved=json.loads(stored.metadata()["wanlite.state"])["step"], steps=RunFolder(self.folder).rows("step"))
        return Progress(saved=0, steps=RunFolder(self.folder).rows("step"))

    def changed(self, name: str, before: Mapping[str, int]) -> bool:
        return _stamp(self.folder / name) != before.get(name, 0)

    def done(self, before: Mapping[str, int]) -> tuple[int, int]:
        """(answers, steps). What was logged counts once the session has come to its steps: by then it has forgotten what it does again."""
        steps = RunFolder(self.folder).rows("step") if self.changed("metrics.jsonl", before) else []
        return len(list(self.cache.glob("*.safetensors"))), steps[-1]["step"] if steps else 0

    def writing(self, before: Mapping[str, int]) -> str:
        """Which file is half-written, or that the student is and its end is not noted; empty when there is nothing of that kind."""
        if any(self.changed(student.name, before) for student in self.folder.glob("student-*")):
            return "noting the end" if RunFolder(self.folder).noted("finished") is None else "after the end"
        for path in self._entries():
            if path.name not in before and path.name.startswith(PREFIX):
                return "writing the student"
            if path.name not in before and path.name.endswith(TEMPORARY):
                return f"writing {'an answer' if path.parent == self.cache else path.name[1:-len('.12345678' + TEMPORARY)]}"
        return ""

    def now(self, before: Mapping[str, int]) -> str:
        """One of MOMENTS, or what lies between them."""
        if writing := self.writing(before):
            return writing
        files, (answers, step) = RunFolder(self.folder), self.done(before)
        if not self.changed("job.json", before):
            return "starting"
        if answers < self.answers:
            return "asking the teacher"
        if files.noted("baseline") is None:
            return "evaluating"
        legs = files.noted("legs")
        if legs is None or not self.changed("metrics.jsonl", before):
            return "loading"
        course = Course.from_json(legs)
        unknown = course.due(step) and all(row["step"] != step for row in files.rows("eval"))
        return "evaluating" if unknown or step == course.total else "training"

    def _entries(self) -> Iterator[Path]:
        for place in (self.folder, self.folder.parent, self.cache):
            if place.exists():
                yield from (place / name for name in os.listdir(place))


def _stamp(path: Path) -> int:
    """0 of a file that is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def strike(start: Callable[[], Session], watched: Watched, kill: Kill) -> Found:
    """Starts a session, kills it and looks at what is left. Raises RuntimeError when the moment does not come."""
    before, earlier = watched.stamps(), watched.progress()
    session = start()
    try:
        _wait(session, watched, kill, before)
    finally:
        session.process.kill()
        session.process.wait()
    later = watched.progress()
    lost = later.steps[later.saved:] if watched.changed("metrics.jsonl", before) else []
    return Found(moment=watched.now(before), redone=len(lost), unreadable=tuple(unreadable(watched)),
                 wrong=tuple(_wrong(earlier, later, lost, session.announced())))


def _wait(session: Session, watched: Watched, kill: Kill, before: Mapping[str, int]) -> None:
    """Returns when the process is to be killed, which is stopped until then where there is no delay."""
    brief = kill.moment.startswith(("writing", "noting"))           # job.json is written in a millisecond
    look, pause, deadline = watched.writing if brief else watched.now, 0.0002 if brief else 0.02, time.monotonic() + PATIENCE
    while True:
        if look(before) == kill.moment and watched.done(before) >= kill.after:
            session.process.send_signal(signal.SIGSTOP)             # looking took time too
            if look(before) == kill.moment:
                break
            session.process.send_signal(signal.SIGCONT)
        if session.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{kill} never came: {watched.now(before)}, {watched.done(before)}.\n{session.log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
        time.sleep(pause)
    if kill.delay:
        session.process.send_signal(signal.SIGCONT)
        time.sleep(kill.delay)


def _wrong(before: Progress, after: Progress, lost: Sequence[Mapping[str, Any]], announced: int) -> Iterator[str]:
    """lost: the steps to be done again. announced: the last one that the session said to be saved."""
    kept, seconds = max(before.saved, announced), [row["seconds"] for row in lost]
    if after.saved < kept:
        yield f"the checkpoint holds step {after.saved}, and step {kept} was saved"
    if after.steps[:before.saved] != before.steps[:before.saved]:           # a step that is done again takes other seconds
        yield f"a step up to {before.saved}, which was saved, was done again"
    if [row["step"] for row in after.steps] != list(range(1, len(after.steps) + 1)):
        yield "the log has a gap"
    if sum(seconds) > 60 * SAVE_EVERY + max(seconds, default=0.0):
        yield f"{sum(seconds):.1f} s of steps are to be done again"


def unreadable(watched: Watched) -> Iterator[str]:
    """The files in place, hidden and temporary ones left out, that do not open whole."""
    for place in (watched.folder, watched.cache):
        for file in sorted(place.rglob("*")):
            if file.is_dir() or any(part.startswith(".") for part in file.relative_to(place).parts):
                continue
            try:
                if file.suffix == ".safetensors":
                    load_file(file)
                else:
                    text = file.read_text(encoding="utf-8")
                    for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
                        json.loads(part)
            except Exception as error:
                yield f"{file.name} cannot be read ({error})"


def differences(one: Path, other: Path) -> list[str]:
    """Which of the files that two runs end with do not hold the same bits."""
    students = sorted(path.relative_to(one) for path in one.glob("student-*/*.safetensors"))
    return [str(name) for name in (Path("checkpoint.safetensors"), Path("best.safetensors"), *students) if _bits(one / name) != _bits(other / name)]


def _bits(file: Path) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, torch.Size, bytes]]]:
    with safe_open(file, "pt") as stored:
        told = stored.metadata()
    return told, {name: (value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, value in load_file(file).items()}


def planned(kills: int, answers: int, steps: int, draw: random.Random) -> list[tuple[str, Kill]]:
    """(door, kill), in the order of the job."""
    def at(moment: str, *after: int) -> Kill:
        return Kill(moment=moment, after=after, delay=draw.uniform(0, MOMENTS[moment]))

    few = max(3, kills // 5)                    # before the first step, and as many after the last one
    early = [at(CACHING[i % 2], asked, 0) for i, asked in enumerate(sorted(draw.randrange(answers // 2) for _ in range(few - 1)))]
    middle = [MIDDLE[i % len(MIDDLE)] for i in range(kills - 2 * few)]
    done = sorted(draw.randrange(1, 3 * steps // 4) for _ in middle)         # an evaluation and a save come after the last of them
    later = [at(moment, answers, 0 if moment == "writing job.json" else step) for moment, step in zip(middle, done)]        # that is at a session's start
    later += [at(END[i // 2 % 2], answers, steps) for i in range(few)]
    return [*(("graph", kill) for kill in (*early, at("evaluating", answers, 0))), *((("graph", "command")[i % 2], kill) for i, kill in enumerate(later))]


def command(folder: Path) -> Session:
    """Goes on with the run without ComfyUI, and without a teacher."""
    log, run = folder.with_name(f"{folder.name}.log"), [sys.executable, "-m", "wanlite_model", "run", str(folder)]
    with log.open("wb") as out:
        going = subprocess.Popen(run, cwd=ROOT, env={**os.environ, **PATIENT}, stdout=out, stderr=subprocess.DEVNULL)  # nosec B603  # no shell
    return Session(log=log, process=going)


def graph(comfyui: Path, base: Path) -> Session:
    """Goes on with the run in a new server."""
    server = ComfyServer(comfyui, base, ("--cpu",))
    try:
        server.wait_until_up()
        server.queue(prompt(server))
    except BaseException:
        server.close()
        raise
    return Session(log=server.log_path, process=server._process)


def prompt(server: ComfyServer) -> dict[str, Any]:
    """The job in API form; a few dozen answers, some seconds of steps, an evaluation every few of them."""
    nodes = {
        "unet": ("UNETLoader", {"unet_name": TEACHER, "weight_dtype": "default"}),
        "shift": ("ModelSamplingSD3", {"model": ["unet", 0], "shift": 3.0}),
        "latent": ("EmptyHunyuanLatentVideo", {"width": 96, "height": 96, "length": 17, "batch_size": 1}),
        "prompts": ("WanLiteEncodePrompts", {"bank": f"input/{BANK}"}),
        "create": ("WanLiteCreateStudent", {"model": ["shift", 0], "prompts": ["prompts", 0], "latent": ["latent", 0], "preset": "1/2 of the blocks",
                                            "method": "interleaved", "cfg": 3.0}),
        "recipe": ("WanLiteRecipe", {"learning_rate": 1e-3, "batch_size": 8, "warmup": 2, "ema_decay": 0.5, "teacher_steps": 2, "renoised": 0.5, "evaluations": 8,
                                     "save_every": SAVE_EVERY}),
        "distil": ("WanLiteDistill", {"student": ["create", 0], "model": ["shift", 0], "prompts": ["prompts", 0], "latent": ["latent", 0],
                                      "recipe": ["recipe", 0], "cfg": 3.0, "steps": STEPS, "run_name": RUN}),
    }
    info = server.object_info()
    return {name: {"class_type": kind, "inputs": {**_defaults(info[kind]["input"]), **given}} for name, (kind, given) in nodes.items()}


def _defaults(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: declared[1]["default"] for name, declared in widgets(spec) if "default" in (*declared, {})[1]}


def put_files(base: Path) -> None:
    """A teacher and a prompt bank, both random, where a ComfyUI with this base folder finds them."""
    torch.manual_seed(0)
    teacher = WanLiteStudent(hidden_size=256, depth=6, ffn_dim=512)
    with torch.no_grad():
        for parameter in teacher.parameters():          # the head of a fresh one is zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    bank = PromptBank(prompts=tuple(f"prompt {i}" for i in range(12)), contexts=tuple(torch.randn(6, 4096) * 0.3 for _ in range(12)), negative_text="",
                      negative=torch.randn(2, 4096) * 0.3)
    for folder in ("models/diffusion_models", "input"):
        (base / folder).mkdir(parents=True)
    save_file(teacher.state_dict(), base / "models/diffusion_models" / TEACHER)
    bank.save(base / "input" / BANK)


def to_the_end(comfyui: Path, base: Path) -> Path:
    """Queues the job and waits; returns the run's folder."""
    with running_comfyui(comfyui, base, ("--cpu",)) as server:
        server.run(prompt(server))
    return base / "output/wanlite/runs" / RUN


def table(strikes: Sequence[tuple[str, Found]]) -> str:
    """A line for each moment and door."""
    counts = Counter((found.moment, door) for door, found in strikes)
    lines = ["| killed while | door | kills | steps to do again, at most | files unreadable |", "|---|---|---|---|---|"]
    order = (*MOMENTS, *sorted({moment for moment, _ in counts} - set(MOMENTS)))
    for (moment, door), count in sorted(counts.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        mine = [found for by, found in strikes if (found.moment, by) == (moment, door)]
        lines.append(f"| {moment} | {door} | {count} | {max(found.redone for found in mine)} | {sum(len(found.unreadable) for found in mine)} |")
    return "\n".join(lines)


def measure(home: Path, kills: int, seed: int) -> tuple[list[tuple[str, Found]], list[str]]:
    """(door, what was found) of each kill, and in which files the two runs differ."""
    comfyui, draw = find_comfyui(), random.Random(seed)     # nosec B311  # the same kills for the same seed
    straight, killed = home / "straight", home / "killed"
    for base in (straight, killed):
        put_files(base)
    whole = to_the_end(comfyui, straight)
    answers = len(list((straight / "output/wanlite/cache").glob("*.safetensors")))
    watched = Watched(folder=killed / whole.relative_to(straight), cache=killed / "output/wanlite/cache", answers=answers)
    doors = {"graph": partial(graph, comfyui, killed), "command": partial(command, watched.folder)}
    strikes = []
    for door, kill in planned(kills, answers, STEPS, draw):
        strikes.append((door, strike(doors[door], watched, kill)))
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {door}: {kill.moment}\n")
    return strikes, differences(whole, to_the_end(comfyui, killed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help=f"how many; {FEWEST} have each moment among them")
    parser.add_argument("--seed", type=int, default=0, help="of their moments")
    given, begun = parser.parse_args(), time.monotonic()
    if given.kills < FEWEST:
        parser.error(f"fewer than {FEWEST} kills leave moments out")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        strikes, different = measure(Path(home), given.kills, given.seed)
    wrong = [f"{door}, {found.moment}: {told}" for door, found in strikes for told in (*found.unreadable, *found.wrong)]
    wrong += [f"no kill hit {moment!r}" for moment in MOMENTS if moment not in {found.moment for _, found in strikes}]
    print(table(strikes), f"\nThe last checkpoint, best weights and student, beside those of the run without a stop: {'different' if different else 'identical'}.",
          *wrong, *different, f"{(time.monotonic() - begun) / 60:.1f} minutes", sep="\n")
    return 1 if wrong or different else 0


if __name__ == "__main__":
    sys.exit(main())
