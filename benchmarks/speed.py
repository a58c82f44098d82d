"""What a step takes beside what it might: `python -m benchmarks.speed` from the repository's root, one table of ratios.

Every line trains the same WAN on one clip a step. Lines take their steps in turn, so that noise hits all of them alike: a ratio is the median of
those of steps that were made one after the other. The bare loop is the forward, backward, clipping, AdamW and weight average that anyone would
write, on a batch that is there already; the trainer also reads its batch from disk, logs and tells. ComfyUI's TrainLoraNode trains a LoRA of the
same rank in the same precision. The teacher's answers are in the cache. The share is that of the operations of three forwards in the time of a step
in what a matrix product does in it, which is measured in turn too. Peaks are those of whole jobs of two steps, loading included.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Semaphore
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from demo.comfy_path import open_comfyui
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.compress.importance import tokens
from wanlite_model.config import WanConfig
from wanlite_model.distill import objectives
from wanlite_model.distill.adapters import Adapters, fresh_factors
from wanlite_model.distill.asking import fill
from wanlite_model.distill.budget import forward_flops, matrix_rate
from wanlite_model.distill.checks import lora_fingerprint
from wanlite_model.distill.data import TeacherCache, plan_units
from wanlite_model.distill.evaluate import student_velocity
from wanlite_model.distill.events import Event, Step
from wanlite_model.distill.inputs import Inputs
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.levers import Levers, LeverSettings
from wanlite_model.distill.optim import WeightAverage, make_optimizer
from wanlite_model.distill.presets import PRESETS
from wanlite_model.distill.trainer import run
from wanlite_model.formats.lora import Lora
from wanlite_model.prompts import PromptBank
from wanlite_model.teacher import FileTeacher
from wanlite_model.transformer import WanLiteStudent

from .memory import SIZES, Noise, random_prompts, random_wan, watched

MIB = 2**20
SMALL, SMALL_SHAPE = WanConfig(dim=256, ffn_dim=1024, num_layers=8), (16, 3, 32, 32)
REAL, REAL_SHAPE = SIZES["1.3B"].resized(num_layers=10, ffn_dim=8960), (16, 9, 60, 104)         # a third of its blocks: all lines are on the card at once
WARM = 3                        # steps that do not count: memory is found, and on a GPU kernels are chosen
RANK = 32
MOST_OVERHEAD = 1.05            # of the trainer over a bare loop
EVERY = {"batch_size": 1, "evaluations": 1, "save_every": 1e6}
VELOCITY = Recipe(**EVERY, teacher_steps=4, rank=RANK)
FEW_STEPS = replace(PRESETS["few-step 4"].recipe, **EVERY, rank=RANK, full_range=0.0, own_states=1.0)
Advance = Callable[[], None]    # makes one step


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A job of the engine, and the lines of other loops that it stands beside, by name."""
    recipe: Recipe
    checkpointing: bool = False
    bare: str
    stock: str = ""
    overhead: bool = False      # whether there is nothing in it but overhead that the bare loop lacks


BARE_ALL, BARE_LORA, STOCK, STOCK_AGAIN = "bare loop, all weights", "bare loop, LoRA", "TrainLoraNode", "TrainLoraNode, checkpointing"
LINES = {
    "velocity, all weights": Line(recipe=replace(VELOCITY, rank=0), bare=BARE_ALL, overhead=True),
    "velocity, all weights, checkpointing": Line(recipe=replace(VELOCITY, rank=0), checkpointing=True, bare=BARE_ALL),
    "velocity, LoRA": Line(recipe=VELOCITY, bare=BARE_LORA, stock=STOCK, overhead=True),
    "velocity, LoRA, checkpointing": Line(recipe=VELOCITY, checkpointing=True, bare=BARE_LORA, stock=STOCK_AGAIN),
    "velocity + features, LoRA": Line(recipe=replace(VELOCITY, objective="velocity + features"), bare=BARE_LORA),
    "trajectory, all states its own, LoRA": Line(recipe=FEW_STEPS, bare=BARE_LORA),
    "distribution, LoRA": Line(recipe=replace(FEW_STEPS, objective="distribution"), bare=BARE_LORA),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each line (default: %(default)s)")
    steps = parser.parse_args().steps
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    open_comfyui()
    import comfy.cli_args
    comfy.cli_args.args.cpu = device.type == "cpu"          # before comfy.model_management is imported
    with tempfile.TemporaryDirectory() as folder:
        work = Work(folder=Path(folder), device=device)
        peaks = {name: peak(work, name) for name in (*(name for name, line in LINES.items() if line.stock), STOCK, STOCK_AGAIN)}
        print(table(work, *timed(work, steps), peaks))


@dataclass
class Work:
    """What all lines are made from."""
    folder: Path
    device: torch.device

    @cached_property
    def config(self) -> WanConfig:
        return SMALL if self.device.type == "cpu" else REAL

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        return SMALL_SHAPE if self.device.type == "cpu" else REAL_SHAPE

    @cached_property
    def file(self) -> Path:
        return random_wan(self.config, self.folder, self.device)

    @cached_property
    def bank(self) -> PromptBank:
        return random_prompts()

    @cached_property
    def teacher(self) -> FileTeacher:
        return FileTeacher(self.file, shift=5.0, device=self.device)

    @cached_property
    def student(self) -> StudentHandle:
        return StudentHandle.of(self.file)

    @cached_property
    def lora(self) -> Lora:
        return Lora(factors=fresh_factors(WanLiteStudent.from_wan(self.config, device="meta"), RANK, torch.Generator()))

    def job(self, line: Line, steps: int) -> DistillJob:
        levers = asdict(Levers(checkpointing=line.checkpointing))
        return DistillJob(student=self.student.fingerprint, teacher=self.teacher.fingerprint, prompts=self.bank.fingerprint, shape=self.shape,
                          shift=5.0, steps=steps, recipe=line.recipe, levers=LeverSettings(**levers),
                          start_from=lora_fingerprint(self.lora) if line.recipe.objective == "distribution" else "")

    def events(self, line: Line, steps: int) -> Iterator[Event]:
        """A run of the engine, with the teacher's answers in the cache."""
        job = self.job(line, steps)
        for _ in fill(job, self.folder / "cache", Noise(self.teacher), Inputs(student=self.student, prompts=self.bank)):
            pass
        return run(job, Path(tempfile.mkdtemp(dir=self.folder)), self.folder / "cache", self.teacher, self.student, self.bank,
                   start_from=self.lora if job.start_from else None)


def timed(work: Work, steps: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each step of each line, all in turn, and the rate of a matrix product before each of them."""
    with ExitStack() as stack:
        advance: dict[str, Advance] = {}
        for name, line in LINES.items():
            events = stack.enter_context(closing(work.events(line, WARM + steps + 1)))          # it evaluates after its last step
            advance[name] = lambda events=events: to_next_step(events)
        for name, line in {BARE_ALL: LINES["velocity, all weights"], BARE_LORA: LINES["velocity, LoRA"]}.items():
            advance[name] = bare_loop(work, line)
        for name in (STOCK, STOCK_AGAIN):
            advance[name] = stack.enter_context(stock_loop(work, name == STOCK_AGAIN, WARM + steps))
        seconds: dict[str, list[float]] = {name: [] for name in advance}
        rates = []
        for _ in range(WARM + steps):
            rates.append(matrix_rate.__wrapped__(work.device.type))            # the function itself remembers its first answer
            for name, step in advance.items():
                seconds[name].append(timing(step, work.device))
    return {name: of[WARM:] for name, of in seconds.items()}, rates[WARM:]


def timing(step: Advance, device: torch.device) -> float:
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def to_next_step(events: Iterator[Event]) -> None:
    while not isinstance(next(events), Step):
        pass


def bare_loop(work: Work, line: Line) -> Advance:
    """The loop that anyone would write for the line's job."""
    job, recipe, cuda = work.job(line, 1), line.recipe, work.device.type == "cuda"
    student = work.student.load(torch.bfloat16 if cuda and recipe.rank else torch.float32, work.device).train()
    trained = dict(student.named_parameters())
    if recipe.rank:
        student.requires_grad_(False)
        trained = Adapters(student, fresh_factors(student, recipe.rank, torch.Generator())).parameters
    optimizer, average = make_optimizer(trained, recipe), WeightAverage(trained, recipe.ema_decay)
    batch = TeacherCache(work.folder / "cache", job, plan_units(job, work.bank, None)).batch(0)
    cond, target = work.bank.cond(batch.prompts), batch.guided(job.cfg).to(work.device)
    scale = target.square().mean()

    def step() -> None:
        objectives.velocity_loss(student_velocity(student, batch.x, batch.sigma, cond), target, scale).mean().backward()
        clip_grad_norm_(trained.values(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(0)

    return step


def stock_model(work: Work) -> Any:
    """What ComfyUI's Load Diffusion Model makes of the file."""
    import comfy.sd
    return comfy.sd.load_diffusion_model(str(work.file), {"dtype": torch.bfloat16 if work.device.type == "cuda" else torch.float32})


def stock_training(work: Work, model: Any, checkpointing: bool, steps: int) -> None:
    """ComfyUI's TrainLoraNode, as its server calls it: every input a list. Of more clips a step it would ask each with each one's prompt."""
    import comfy.utils
    from comfy_extras.nodes_train import TrainLoraNode
    comfy.utils.set_progress_bar_enabled(False)
    clips = torch.randn(len(work.bank), 1, *work.shape, generator=torch.Generator().manual_seed(0))
    given = {"batch_size": 1, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": VELOCITY.learning_rate,
             "rank": RANK, "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "bf16" if work.device.type == "cuda" else "fp32",
             "lora_dtype": "fp32", "algorithm": "LoRA", "gradient_checkpointing": checkpointing, "existing_lora": "[None]"}
    defaults = {widget.id: widget.default for widget in TrainLoraNode.GET_SCHEMA().inputs if getattr(widget, "default", None) is not None}
    TrainLoraNode.execute(model=[model], latents=[{"samples": clip} for clip in clips],         # newer ComfyUIs' node has more widgets
                          positive=[[[context[None], {}]] for context in work.bank.contexts],
                          **{name: [value] for name, value in {**defaults, **given}.items()})


@contextmanager
def stock_loop(work: Work, checkpointing: bool, steps: int) -> Iterator[Advance]:
    """Its training in a thread of its own, which waits before each step until it is asked for that; it has to be asked for all."""
    import comfy.model_management
    import comfy.utils
    wanted, made = Semaphore(0), Semaphore(0)

    def stepped(*_: Any, **__: Any) -> None:
        comfy.model_management.current_loaded_models.clear()            # else the next training would move this one's model off a GPU
        made.release()
        wanted.acquire()

    def train() -> None:
        wanted.acquire()
        comfy.utils.set_progress_bar_global_hook(stepped)       # taken over when the training begins
        try:
            stock_training(work, stock_model(work), checkpointing, steps)
        finally:
            made.release()                  # also where it fails

    def advance() -> None:
        wanted.release()
        made.acquire()
        if training.done():
            training.result()

    with ThreadPoolExecutor(1) as thread:
        training = thread.submit(train)
        yield advance
        wanted.release()


def peak(work: Work, name: str) -> int:
    """Bytes of a job of two steps, from loading on."""
    events = work.events(LINES[name], 2) if name in LINES else None
    with watched(work.device) as most:
        if events is None:
            stock_training(work, stock_model(work), name == STOCK_AGAIN, 2)
        else:
            for _ in events:
                pass
        return most()


HEADINGS = ("| | s a step | to the bare loop | to TrainLoraNode | share of the matrix rate | peak MiB | to TrainLoraNode |\n"
            "|---|---|---|---|---|---|---|")


def table(work: Work, seconds: dict[str, list[float]], rates: list[float], peaks: dict[str, int]) -> str:
    lines, needed = [HEADINGS], 3 * forward_flops(work.config, tokens(work.shape))
    for name, of in seconds.items():
        line = LINES.get(name)
        bare = stock = memory = share = "-"
        if line is not None:
            bare = judged(ratio(of, seconds[line.bare]), MOST_OVERHEAD if line.overhead else None)
        if line is not None and line.stock:
            stock, memory = judged(ratio(of, seconds[line.stock]), 1.0), judged(peaks[name] / peaks[line.stock], 1.0)
        if "all weights" in name:
            share = f"{ratio([needed / second for second in of], rates):.2f}"
        taken = f"{peaks[name] / MIB:.0f}" if name in peaks else "-"
        lines.append(f"| {name} | {statistics.median(of):.3f} | {bare} | {stock} | {share} | {taken} | {memory} |")
    return "\n".join(lines)


def ratio(mine: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, others, strict=True))


def judged(value: float, most: float | None) -> str:
    return f"{value:.3f}" + ("" if most is None else " PASS" if value <= most else " FAIL")


if __name__ == "__main__":
    main()
