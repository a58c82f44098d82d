"""What a job is said to take beside what it takes: `python -m benchmarks.memory` from the repository's root, one table with their ratio.

A line is a whole job of the engine, from loading to the student that is handed out, on random weights and with the teacher's answers in the cache.
On a CPU the WAN is small, and the bytes of live tensors are counted; on a GPU it has the width of a released one, and what torch allocated at the
most, beyond what it had, counts. --cap: presets on whole WANs of released sizes, in clips of 832 x 480 and 17 frames. Another process takes so much of
the card that it looks that small, and the job chooses its levers itself; a line passes that came through with them. Seconds are of the last step;
on a CPU, where the counting takes long, there are none.
"""
from __future__ import annotations

import argparse
import logging
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from wanlite_model.compress.blockwise import heal_blocks
from wanlite_model.compress.build import create_student
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.compress.importance import Probe
from wanlite_model.compress.plan import CompressionPlan, interleaved
from wanlite_model.config import WanConfig
from wanlite_model.distill import data
from wanlite_model.distill.adapters import fresh_factors
from wanlite_model.distill.asking import fill
from wanlite_model.distill.checks import lora_fingerprint
from wanlite_model.distill.events import Planned, Step
from wanlite_model.distill.inputs import Inputs
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.levers import LeverSettings, ladder
from wanlite_model.distill.live import LiveBytes
from wanlite_model.distill.presets import PRESETS
from wanlite_model.distill.trainer import run
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.keymap import wan_shapes
from wanlite_model.formats.lora import Lora
from wanlite_model.formats.read import open_wan
from wanlite_model.formats.write import write_student
from wanlite_model.prompts import PromptBank
from wanlite_model.teacher import FileTeacher
from wanlite_model.transformer import WanLiteStudent

from . import result_of

log = logging.getLogger(__name__)

GIB = 2**30
WITHIN = 0.1                    # of what was measured
STEPS = 2                       # with the second the optimizer has its moments
SIZES = {"small": WanConfig(dim=384, ffn_dim=1024, num_layers=8), "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_layers=30),
         "14B": WanConfig(dim=5120, ffn_dim=13824, num_layers=40)}
# Held-out states as many as share a forward at the least, and no more of the teacher's answers than that.
BRIEF = {"teacher_steps": 1, "renoised": 0.75, "evaluations": 1}
TRAINED = {"adapters": Recipe(**BRIEF, rank=32), "all, AdamW": Recipe(**BRIEF), "all, Muon": Recipe(**BRIEF, optimizer="Muon")}
FEW_STEPS = {**BRIEF, "rank": 32, "teacher_steps": 2, "student_steps": 2}
CAPPED = {name: replace(PRESETS[name].recipe, **BRIEF) for name in ("no-cfg", "slim")}
OTHERS = {"all, features": Recipe(**BRIEF, objective="velocity + features"),
          "all, own states": Recipe(**BRIEF | {"teacher_steps": 2}, own_states=1.0),
          "adapters, trajectory": Recipe(**FEW_STEPS, objective="trajectory", own_states=1.0),
          "adapters, distribution": Recipe(**FEW_STEPS, objective="distribution")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """What is trained on, and how many of the WAN's blocks are: frames, rows and columns of latent; clips a batch."""
    frames: int
    rows: int
    columns: int
    batch: int
    blocks: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 16, self.frames, self.rows, self.columns


CLIPS = {"small": (Clips(frames=5, rows=20, columns=20, batch=2, blocks=8), Clips(frames=1, rows=32, columns=32, batch=1, blocks=8),
                   Clips(frames=9, rows=16, columns=16, batch=16, blocks=4)),
         "1.3B": (Clips(frames=5, rows=60, columns=104, batch=2, blocks=10),), "14B": (Clips(frames=5, rows=60, columns=104, batch=2, blocks=4),)}
WHOLE = Clips(frames=5, rows=60, columns=104, batch=4, blocks=0)            # on the cards of --cap; blocks: as many as the preset is for
PROBED = 4                      # states that blocks are trained on
RAM = 64                        # GiB of the computer around such a card


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One job. cap: GiB that the card is made to look like."""
    size: str
    clips: Clips
    trained: str
    levers: LeverSettings = field(default_factory=LeverSettings)
    cap: int | None = None

    @property
    def recipe(self) -> Recipe:
        return replace({**TRAINED, **OTHERS, **CAPPED}[self.trained], batch_size=self.clips.batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Bytes that were predicted and that were measured, and what was done to save memory, first and after each time that it did not fit; seconds of a
    step that were expected and that it took.

    measured: None where it did not fit whatever was done. predicted: None where nothing could be said, or the job was refused: without levers.
    """
    predicted: int | None
    measured: int | None
    levers: tuple[str, ...]
    seconds: tuple[float, float] | None = None

    @property
    def passes(self) -> bool:
        return None not in (self.predicted, self.measured) and len(self.levers) == 1 and abs(self.predicted / self.measured - 1) <= WITHIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1.3B", "14B"] if cuda else ["small"], help="default: %(default)s")
    if cuda:
        parser.add_argument("--cap", nargs="+", type=int, metavar="GIB", help="jobs on cards of these sizes, such as 8 12 16 24")
        parser.add_argument("--batch", type=int, default=4, help="clips a step of these jobs (default: %(default)s, as in the presets)")
        parser.add_argument("--presets", nargs="+", choices=CAPPED, default=[*CAPPED], help="of these jobs; default: %(default)s")
    given, device = parser.parse_args(), torch.device("cuda:0" if cuda else "cpu")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if cuda:
        torch.mm(*torch.ones(2, 256, 256, device=device, dtype=torch.bfloat16))          # its library takes memory at the first product, for good
    print(HEADINGS, flush=True)
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            caps = cuda and given.cap
            config = SIZES[size] if caps else SIZES[size].resized(num_layers=CLIPS[size][0].blocks, ffn_dim=SIZES[size].ffn_dim)
            teacher = FileTeacher(random_wan(config, Path(folder), device), shift=5.0, device=device)
            for line in capped(size, caps, given.presets, given.batch) if caps else lines(size, device.type):
                print(written(line, measure(line, teacher, Path(folder))), flush=True)
            if caps:
                print(written_block_wise(size, caps[0], block_wise(teacher, caps[0])), flush=True)


def lines(size: str, device_type: str) -> Iterator[Line]:
    """Every rung of what can be trained, on every kind of clips; then the other objectives, with the last rung before blocks are swapped."""
    for clips in CLIPS[size]:
        for trained in TRAINED:
            for levers in settings(trained, clips, device_type):
                yield Line(size=size, clips=clips, trained=trained, levers=levers)
    whole = CLIPS[size][0]
    for trained, recipe in OTHERS.items():
        clips = whole if recipe.rank else replace(whole, blocks=whole.blocks // 2)              # then the teacher is beside it
        *_, last = (levers for levers in settings(trained, clips, device_type) if not levers.swapped_blocks)
        yield Line(size=size, clips=clips, trained=trained, levers=last)


def settings(trained: str, clips: Clips, device_type: str) -> list[LeverSettings]:
    """The ladder, each rung as what a user could ask for. In 8 bits Muon is AdamW, which has that line."""
    recipe = {**TRAINED, **OTHERS}[trained]
    rungs = ladder(LeverSettings(), frozen=recipe.rank > 0, blocks=clips.blocks, device_type=device_type)
    return [LeverSettings(**asdict(levers)) for levers in rungs if not (levers.optimizer_8bit and recipe.optimizer == "Muon")]


def capped(size: str, caps: list[int], presets: list[str], batch: int) -> Iterator[Line]:
    blocks = SIZES[size].num_layers
    for cap in caps:
        for preset in presets:
            stay = len(interleaved(blocks, blocks * 2 // 3)) if preset == "slim" else blocks
            yield Line(size=size, clips=replace(WHOLE, blocks=stay, batch=batch), trained=preset, levers=LeverSettings(ram_gib=RAM), cap=cap)


def measure(line: Line, teacher: FileTeacher, folder: Path) -> Peak:
    """What the job is said to take, and what it takes. folder: for the teacher's answers, which other lines share."""
    device = teacher.device
    handle, start_from = started(line, teacher, folder), a_lora(line, teacher)
    bank = random_prompts()
    job = DistillJob(student=handle.fingerprint, teacher=teacher.fingerprint, prompts=bank.fingerprint, shape=line.clips.shape, shift=5.0, cfg=3.0,
                     steps=STEPS, recipe=line.recipe, levers=line.levers, start_from=lora_fingerprint(start_from) if start_from else "")
    for _ in fill(job, folder / "cache", Noise(teacher), Inputs(student=handle, prompts=bank)):
        pass
    plans, seconds, measured = [], [], None
    with tempfile.TemporaryDirectory(dir=folder) as place, looking_like(line.cap, device), watched(device) as most:
        try:
            for event in run(job, Path(place) / "run", folder / "cache", teacher, handle, bank, start_from=start_from):
                plans += [event.budget] if isinstance(event, Planned) else []
                seconds += [event.seconds] if isinstance(event, Step) else []
            measured = most()
        except WanLiteError as error:           # the card is too small, as was said before it began, or turned out to be
            log.info("%s", error)
    said = plans[0].peaks if plans else None
    return Peak(predicted=said and said.device, measured=measured, levers=tuple(plan.rungs[0].told() for plan in plans),
                seconds=(plans[-1].step_seconds, seconds[-1]) if seconds and device.type == "cuda" else None)


def block_wise(teacher: FileTeacher, cap: int) -> int | None:
    """The most that training block by block takes, of the last two blocks that stay where one is taken away between them; None where it does not fit."""
    last = teacher.config.num_layers - 1
    plan = CompressionPlan(keep=(*range(last - 1), last), ffn_dim=teacher.config.ffn_dim, method="given", teacher_layers=last + 1,
                           teacher_ffn_dim=teacher.config.ffn_dim)
    probe = Probe(x=torch.randn(PROBED, 16, WHOLE.frames, WHOLE.rows, WHOLE.columns), sigma=torch.rand(PROBED), cond=random_prompts().cond(range(PROBED)))
    with looking_like(cap, teacher.device), open_wan(teacher.path) as source, watched(teacher.device) as most:
        try:
            for _ in heal_blocks(teacher, lambda name: source.tensor(name.replace(f"blocks.{last - 1}.", f"blocks.{last}.")), plan, probe, STEPS, lambda _: None):
                pass
            return most()
        except torch.cuda.OutOfMemoryError as error:
            log.info("%s", error)
            return None
        finally:
            teacher.release()


def random_wan(config: WanConfig, folder: Path, device: torch.device = torch.device("cpu")) -> Path:
    """A file of such a WAN, in bf16. device: that draws its numbers."""
    file = folder / f"{config.dim}.safetensors"
    if not file.exists():
        write_student(file, config=config, tensors=((name, torch.randn(shape, device=device).mul_(0.02).bfloat16()) for name, shape in wan_shapes(config).items()),
                      layout="single file", dtype=torch.bfloat16)
    return file


def random_prompts() -> PromptBank:
    """The same each time, so that jobs share the teacher's answers."""
    negative, *contexts = torch.randn(9, 10, 4096, generator=torch.Generator().manual_seed(0))
    return PromptBank(prompts=tuple(f"prompt {i}" for i in range(len(contexts))), contexts=tuple(contexts), negative_text="", negative=negative)


def started(line: Line, teacher: FileTeacher, folder: Path) -> StudentHandle:
    """The teacher itself, or as many of its blocks as the line has."""
    if line.clips.blocks == teacher.config.num_layers:
        return StudentHandle.of(teacher.path)
    return result_of(create_student(teacher, None, line.clips.shape, depth=line.clips.blocks, method="interleaved", folder=folder / "starts"))[0]


def a_lora(line: Line, teacher: FileTeacher) -> Lora | None:
    """What distribution matching goes on from."""
    if line.recipe.objective != "distribution":
        return None
    return Lora(factors=fresh_factors(WanLiteStudent.from_wan(teacher.config, device="meta"), line.recipe.rank, torch.Generator()))


class Noise:
    """Answers in a teacher's place without being one: how much memory a job takes does not depend on what it learns."""

    def __init__(self, teacher: FileTeacher) -> None:
        self.device = teacher.device

    def velocity(self, x: Tensor, *_: Any) -> Tensor:
        return torch.randn_like(x)


@contextmanager
def watched(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that says how many bytes this thread has taken on the device at the most since the start."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with LiveBytes() as count, patch.object(data, "ThreadPoolExecutor", Here):
        yield lambda: count.peak(device.type)


class Here:
    """An executor without threads of its own: a count of live bytes sees one thread."""

    def __init__(self, _: int) -> None:
        pass

    def submit(self, function: Callable[..., Any], *given: Any) -> Future:
        done: Future = Future()
        done.set_result(function(*given))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


@contextmanager
def looking_like(cap: int | None, device: torch.device) -> Iterator[None]:
    """Inside, the card has `cap` GiB less what is used of it now; all of it without a cap."""
    if cap is None:
        yield
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    here, there = multiprocessing.Pipe()
    holder = multiprocessing.get_context("spawn").Process(target=hold_all_but, args=(cap * GIB - (total - free), there), daemon=True)
    holder.start()
    here.recv()                 # it has what it wants
    try:
        yield
    finally:
        here.send(None)
        holder.join()


def hold_all_but(left: int, signal: Connection) -> None:
    """Holds the rest of the card until it is told to let go. In a process of its own: what torch holds in the job's counts as free."""
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda")
    signal.send(None)
    signal.recv()
    del held


HEADINGS = ("| WAN | blocks | latents | batch | trained | to save memory | predicted GiB | measured GiB | ratio | | expected s a step | took |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|---|")


def written(line: Line, peak: Peak) -> str:
    clips = line.clips
    card = f", card of {line.cap} GiB" if line.cap else ""
    predicted, measured = ("-" if value is None else f"{value / GIB:.3f}" for value in (peak.predicted, peak.measured))
    ratio = "-" if None in (peak.predicted, peak.measured) else f"{peak.predicted / peak.measured:.3f}"
    seconds = "- | -" if peak.seconds is None else " | ".join(f"{value:.2f}" for value in peak.seconds)
    verdict = "PASS" if peak.passes else "FAIL" if peak.levers else "refused before it began"
    return (f"| {line.size} | {clips.blocks} | {clips.frames} x {clips.rows} x {clips.columns} | {clips.batch} | {line.trained}{card} | "
            f"{'; then '.join(peak.levers)} | {predicted} | {measured} | {ratio} | {verdict} | {seconds} |")


def written_block_wise(size: str, cap: int, most: int | None) -> str:
    measured, verdict = ("-", "FAIL") if most is None else (f"{most / GIB:.3f}", "PASS")
    return (f"| {size} | {SIZES[size].num_layers} | {WHOLE.frames} x {WHOLE.rows} x {WHOLE.columns} | 1 | block by block, card of {cap} GiB | | - | {measured} | - | "
            f"{verdict} | - | - |")


if __name__ == "__main__":
    main()
