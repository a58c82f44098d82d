"""What a job will take, told before its first step: memory, by running a step dry; disk, from shapes; time, from its arithmetic.

And what is done so that it fits: the first rung of the ladder (see levers.py) on which it does.
"""
from __future__ import annotations

import bisect
import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from ..compress.importance import tokens
from ..compress.plan import interleaved
from ..cond import Shown
from ..config import TEXT_DIM, WanConfig
from ..errors import WanLiteError
from ..formats.keymap import wan_size
from ..formats.lora import Factors, Lora
from ..prompts import PromptBank
from ..swap import lay_out
from ..teacher import AbsentTeacher
from ..transformer import WanLiteStudent
from .adapters import BaseTeacher, adapter_size
from .begin import empty_student, state_of
from .checkpoint import TrainState, size_of
from .data import Batch, TeacherCache
from .dry import dry_run
from .evaluate import at_once, student_velocity
from .job import DistillJob, Recipe
from .learner import TOKENS_A_PASS, Learner
from .levers import Levers, LeverSettings, ladder
from .modes import trains
from .objectives import feature_pairs
from .paths import state_counts

log = logging.getLogger(__name__)

GIB = 2**30
SPARE = 0.92                    # of what is free: allocators round up, and libraries take workspaces
USED = 0.45                     # of a matrix rate that training reaches
AVERAGED = 1.2e-9               # seconds a step for each number whose average lies in CPU memory: over the bus, and there; beside an H200 it took that
BACKWARD = 2                    # forwards that a backward pass is worth
SLOW, SLOW_STEPS = 10, 5        # memory elsewhere makes steps some fifty times as long; arithmetic may err by a few times
PARTS = 2                       # of a batch that are run dry: with the second there are gradients already


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Bytes that a job may have: of the device, of CPU memory beside it, and of the drives that its run and its cache are on."""
    device: int
    ram: int
    run_disk: int
    cache_disk: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """The most bytes that are alive at once: on the device (a CPU's memory where that is the device), and beside it in CPU memory. saved: of a
    checkpoint.
    """
    device: int
    ram: int
    saved: int

    def fit(self, machine: Machine) -> bool:
        return self.device <= SPARE * machine.device and self.ram <= SPARE * machine.ram


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """rungs: of levers, the first that fits and those after it, for the case that it does not. peaks: with the first; None where they could not be
    predicted. run, cache: bytes still to be written to disk. step_seconds, asking_seconds: of a step and of asking the teacher, by arithmetic.
    """
    rungs: tuple[Levers, ...]
    peaks: Peaks | None
    machine: Machine
    run: int
    step_seconds: float
    cache: int = 0
    asking_seconds: float = 0.0

    def told(self, steps: int) -> str:
        """For the node and the log. steps: still to come; 0 where the minutes decide, and then how much the teacher is asked shows later."""
        memory = "The memory that this job takes could not be predicted" if self.peaks is None else (
            f"Memory: {amount(self.peaks.device)} of {amount(self.machine.device)}"
            + (f", and {amount(self.peaks.ram)} of {amount(self.machine.ram)} beside the card" if self.peaks.ram else ""))
        whole = f", {(steps * self.step_seconds + self.asking_seconds) / 60:.1f} min in all" if steps else ""
        answers = f", {amount(self.cache)} for the teacher's answers" if steps else ""
        return f"{memory}. To save memory: {self.rungs[0].told()}. Disk: {amount(self.run)} for the run{answers}. About {self.step_seconds:.2g} s a step{whole}."


def amount(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 2 else f"{size / 2**20:.0f} MiB"


def this_machine(device: torch.device, run: Path, cache: Path, settings: LeverSettings = LeverSettings()) -> Machine:
    """What is free here now, or what the settings say of another machine. What this process holds on the device counts as free."""
    import psutil
    free = psutil.virtual_memory().available
    on_device = free
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return Machine(device=int(settings.gpu_gib * GIB) or on_device, ram=int(settings.ram_gib * GIB) or free,
                   run_disk=int(settings.disk_gib * GIB) or free_disk(run), cache_disk=int(settings.disk_gib * GIB) or free_disk(cache))


def free_disk(place: Path) -> int:
    """Bytes that are free on the drive of a folder that may not be there yet."""
    place = Path(place).absolute()
    return shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.exists())).free


def plan(job: DistillJob, config: WanConfig, machine: Machine, device: torch.device, prompts: PromptBank, lora: Lora | None = None,
         noted: Levers | None = None, beside: WanConfig | None = None, stored: torch.dtype = torch.bfloat16) -> Budget:
    """The first rung that fits, from the one that the run was on before (`noted`). beside: the teacher, where it is in memory too. stored: the dtype of
    the student's file.

    Raises WanLiteError, with the smallest change that fits, when none does.
    """
    rungs = list(ladder(job.levers, frozen=job.recipe.rank > 0, blocks=config.num_layers, device_type=device.type))
    rungs = rungs[rungs.index(noted):] if noted in rungs else rungs

    def peaks_of(job: DistillJob, config: WanConfig, levers: Levers) -> Peaks:
        return predicted(job, config, levers, device.type, prompts, lora, beside, stored)

    def budget(rungs: Sequence[Levers], peaks: Peaks | None) -> Budget:
        return Budget(rungs=tuple(rungs), peaks=peaks, machine=machine, run=0 if peaks is None else run_bytes(peaks, config, job),
                      step_seconds=step_seconds(job, config, rungs[0], matrix_rate(device.type), device.type))

    for i, levers in enumerate(rungs):
        try:
            peaks = peaks_of(job, config, levers)
        except Exception as error:              # a torch that cannot be run dry as this one can: the job is worth more than its prediction
            log.warning("WanLite: memory could not be predicted (%s: %s); should the job not fit, it goes on with less of it.", type(error).__name__, error)
            return budget(rungs, None)
        if peaks.fit(machine):
            return budget(rungs[i:], peaks)
    given = prompts.shown[0].given if prompts.shown else None
    least = 1 if given is None else given.shape[1] + 1              # a clip has frames that are not given
    raise _refused(job, config, machine, peaks, lambda job, config: peaks_of(job, config, rungs[-1]), least)


def _refused(job: DistillJob, config: WanConfig, machine: Machine, peaks: Peaks, peaks_of: Callable[[DistillJob, WanConfig], Peaks], least: int
             ) -> WanLiteError:
    """With the smallest change that fits. least: latent frames that a clip must have."""
    beside = "" if peaks.ram <= SPARE * machine.ram else f", and {amount(peaks.ram)} of the computer's memory, of which {amount(machine.ram)} are free"
    found = f"This job takes {amount(peaks.device)} of the {amount(machine.device)} that are free on the device{beside}, whatever is done to save memory."
    fewer = [replace(job, shape=(job.shape[0], t, *job.shape[2:])) for t in range(least, job.shape[1])]
    fitting = bisect.bisect_left(fewer, True, key=lambda job: not peaks_of(job, config).fit(machine))       # fewer frames take less
    if fitting:
        return WanLiteError(found, "", f"Set the LATENT's length to {4 * (fewer[fitting - 1].shape[1] - 1) + 1} frames: that fits.")
    if not job.recipe.rank and not job.matching:
        adapters = replace(job, recipe=replace(job.recipe, rank=32))
        if any(peaks_of(replace(adapters, shape=shape.shape), config).fit(machine) for shape in (job, *fewer[:1])):
            return WanLiteError(found, "", "Set rank to 32 in WanLite Recipe: adapters are trained instead of all weights, and that fits.")
    return WanLiteError(found, "", "Lower the width and height of the LATENT, take away more blocks with WanLite Create Student, or close what else uses the card.")


def step_seconds(job: DistillJob, config: WanConfig, levers: Levers, rate: float, device_type: str) -> float:
    """Of a step on a device whose matrix products do `rate` operations a second."""
    averaged = _size(config, job.recipe.rank) if levers.optimizer_8bit and device_type == "cuda" else 0
    return step_flops(job, config, levers) / (USED * rate) + AVERAGED * averaged


def _size(config: WanConfig, rank: int) -> int:
    """Numbers of what is trained."""
    return adapter_size(config, rank) if rank else wan_size(config)


def step_flops(job: DistillJob, config: WanConfig, levers: Levers) -> float:
    """Of the student's forward and backward in one step."""
    return job.recipe.batch_size * (1 + BACKWARD + levers.checkpointing) * forward_flops(config, tokens(job.shape))


def forward_flops(config: WanConfig, count: int, text: int = 64) -> float:
    """Floating-point operations of a forward of one sample of `count` tokens beside `text` tokens of text: two for each multiplication of a matrix product."""
    dim = config.dim
    projections = 2 * dim * dim * (6 * count + 2 * text)            # q, k, v, o of the tokens; q and o beside k and v of the text
    attention = 4 * count * dim * (count + text)
    return config.num_layers * (projections + attention + 4 * count * dim * config.ffn_dim) + 2 * text * dim * (TEXT_DIM + dim)


def asking_flops(cache: TeacherCache, teacher: WanConfig) -> float:
    """Of the teacher's answers in the units that are missing."""
    missing = sum(not cache.intact(unit) for unit in cache.units)
    return missing * sum(state_counts(cache.job)) * (2 if cache.job.guided else 1) * forward_flops(teacher, tokens(cache.job.shape))


@functools.cache
def matrix_rate(device_type: str) -> float:
    """Floating-point operations a second of a matrix product, measured here: in bf16 on a GPU, in fp32 on a CPU."""
    size, dtype = (4096, torch.bfloat16) if device_type == "cuda" else (768, torch.float32)
    a = torch.ones(size, size, device=device_type, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def run_bytes(peaks: Peaks, config: WanConfig, job: DistillJob) -> int:
    """On disk: the checkpoint, the next one while it is written, the best weights and the student that is handed out, in bf16."""
    return 2 * peaks.saved + 3 * 2 * _size(config, job.recipe.rank)


def check_disk(needed: int, free: int, place: Path, what: str) -> None:
    """Raises WanLiteError when a drive lacks room."""
    if needed > free:
        raise WanLiteError(f"{what} takes {amount(needed)} on disk, and {amount(free)} are free on the drive of {place.name!r}.", "",
                           "Free space there, or take fewer prompts or frames.")


def spilled(seconds: Sequence[float], expected: float) -> bool:
    """Whether steps take as long as they do on Windows where a card's memory goes on in the computer's: the last ones twice as long as the shortest, or
    all of them many times what arithmetic expects. seconds: of the steps so far.
    """
    if len(seconds) < SLOW_STEPS:
        return False
    return min(seconds[-SLOW_STEPS:]) > 2 * min(seconds) or min(seconds) > SLOW * expected


@contextmanager
def capped(device: torch.device, machine: Machine) -> Iterator[None]:
    """On a GPU, inside, what does not fit is an error: Windows would go on in the computer's own memory, at a fiftieth of the speed."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, machine.device / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def predicted(job: DistillJob, config: WanConfig, levers: Levers, device_type: str, prompts: PromptBank, lora: Lora | None = None,
              beside: WanConfig | None = None, stored: torch.dtype = torch.bfloat16) -> Peaks:
    """What the training of such a student takes, from steps and a forward of an evaluation that are run dry. lora: that it begins with. beside: the
    teacher, where it is asked while it trains and is not the student's base. stored: the dtype of the student's file.
    """
    longest = max(map(len, (*prompts.contexts, prompts.negative)))
    a_pass = max(1, TOKENS_A_PASS // tokens(job.shape))
    size = min(job.recipe.batch_size, max(1, a_pass // 2) if job.matching else PARTS * a_pass)          # its guided teacher takes two of each
    objective = job.recipe.objective if job.matching or job.recipe.objective == "velocity + features" else "velocity"
    kind = Recipe(rank=job.recipe.rank, optimizer=job.recipe.optimizer, objective=objective, batch_size=size)
    alike = DistillJob(student="", teacher="", prompts="", shape=job.shape, shift=1.0, steps=1, recipe=kind)            # all that decides it
    begin = () if lora is None else tuple((layer, len(found.down), *found.down.shape[1:], len(found.up)) for layer, found in lora.factors.items())
    # A picture's latents are as long as the clip, which may be a shorter one than they were encoded for.
    shown = tuple((name, (len(value), *job.shape[1:]) if name == "image" else tuple(value.shape))
                  for name, value in (prompts.shown[0].tensors().items() if prompts.shown else ()))
    return _predicted(alike, config, levers, device_type, longest, shown, begin, beside, stored)


@functools.lru_cache(maxsize=256)
def _predicted(job: DistillJob, config: WanConfig, levers: Levers, device_type: str, longest: int, shown: tuple[tuple[str, tuple[int, ...]], ...],
               begin: tuple[tuple[str, int, int, int], ...], beside: WanConfig | None, stored: torch.dtype) -> Peaks:
    """longest: tokens of a prompt. shown: names and shapes of what comes with it. begin: (layer, rank, columns, rows) of factors to begin with."""
    device, prompts = torch.device(device_type), _prompts_of(longest, shown)
    with dry_run(device_type) as count:
        lora = Lora(factors={layer: Factors(down=torch.empty(rank, columns), up=torch.empty(rows, rank), scale=1.0) for layer, rank, columns, rows in begin})
        state = _dry_state(job, config, levers, device, lora, stored)
        learner = _dry_learner(job, state, prompts, device, config, beside)
        if state.critic is not None:            # it learns in steps of its own, and what the optimizer keeps of it stays
            with state.adapters.switched(False), state.critic.switched(True):
                _dry_step(learner, state, 1)
        for size in (1, job.recipe.batch_size):         # an optimizer has its moments from the second step on
            _dry_step(learner, state, size)
        saved = size_of(state)
        _dry_evaluation(job, state, prompts)
        return Peaks(device=count.peak(device_type), ram=0 if device_type == "cpu" else count.peak("cpu"), saved=saved)


@trains
def _dry_state(job: DistillJob, config: WanConfig, levers: Levers, device: torch.device, lora: Lora, stored: torch.dtype) -> TrainState:
    return state_of(job, empty_student(job, config, levers, device, stored), lora, levers)


@trains
def _dry_learner(job: DistillJob, state: TrainState, prompts: PromptBank, device: torch.device, config: WanConfig, beside: WanConfig | None) -> Learner:
    """Its batches are of the size that is asked for as if it were a step. Its teacher lies beside the student, or under the student's adapters."""
    its = beside or config
    module = state.student if beside is None else _dry_teacher(beside, device)
    adapters = [part for part in (state.adapters, state.critic) if part and beside is None]
    online = BaseTeacher(module, adapters, AbsentTeacher(its, shift=1.0, fingerprint="", name="", device=device))
    pairs = feature_pairs(interleaved(its.num_layers, config.num_layers), its.num_layers) if job.recipe.objective == "velocity + features" else ()
    return Learner(job=job, student=state.student, prompts=prompts, online=online, device=device, draw=lambda size: _batch(job.shape, size), pairs=tuple(pairs))


def _dry_teacher(config: WanConfig, device: torch.device) -> WanLiteStudent:
    module = WanLiteStudent.from_wan(config, "meta", torch.bfloat16 if device.type == "cuda" else torch.float32).requires_grad_(False)
    lay_out(module, device)
    return module


@trains
def _dry_step(learner: Learner, state: TrainState, size: int) -> None:
    for _ in learner.gradients(size, 1):
        pass
    if state.released:
        state.released.norm()
    else:
        clip_grad_norm_(state.trained.values(), learner.job.recipe.max_grad_norm)
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.average.update(0)


def _dry_evaluation(job: DistillJob, state: TrainState, prompts: PromptBank) -> None:
    size = at_once(job)
    with state.average.in_place(), torch.no_grad():
        student_velocity(state.student, torch.empty(size, *job.shape), torch.ones(size), prompts.cond([0] * size))


def _prompts_of(length: int, shown: tuple[tuple[str, tuple[int, ...]], ...]) -> PromptBank:
    context = torch.ones(length, TEXT_DIM)
    pictures = (Shown(**{name: torch.zeros(shape) for name, shape in shown}),) if shown else ()
    return PromptBank(prompts=("",), contexts=(context,), negative_text="", negative=context[:1], shown=pictures)


def _batch(shape: tuple[int, int, int, int], size: int) -> Batch:
    x = torch.empty(size, *shape)
    return Batch(x=x, sigma=torch.ones(size), v_pos=torch.empty_like(x), prompts=(0,) * size)
