"""What a training begins with: the student in memory, what of it moves, and who is asked while it does."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..compress.handle import StudentHandle
from ..config import WanConfig
from ..errors import WanLiteError
from ..formats.lora import Factors, Lora, read_lora, stacked
from ..swap import lay_out
from ..teacher import Teacher
from ..transformer import WanLiteStudent
from .adapters import Adapters, BaseTeacher, fresh_factors
from .checkpoint import TrainState
from .paths import seeded
from .frozen import hold_in_float8, places
from .job import DistillJob
from .levers import Levers
from .optim import Released, WeightAverage, is_matrix, make_optimizer


def fresh_state(job: DistillJob, handle: StudentHandle, teacher: Teacher, start_from: Lora | None, levers: Levers = Levers()) -> TrainState:
    """The state before the first step. Raises WanLiteError when the student is not one that the objective can go on from."""
    begin, merged = start_from or Lora(factors={}), handle
    if job.matching:
        begin, merged = few_step_lora(job, handle, teacher, start_from), replace(handle, loras=())
    with merged.open() as opened:
        module = empty_student(job, merged.config, levers, teacher.device, opened.source.dtype)
        # What adapters cannot carry, or all of it where there are none, becomes part of the weights.
        into, changes = places(module), replace(begin, factors={}) if job.recipe.rank else begin
        with torch.no_grad():
            for name, tensor in changes.merged(opened.tensors()):
                into[name].copy_(tensor)
    return state_of(job, module, begin, levers)


def empty_student(job: DistillJob, config: WanConfig, levers: Levers, device: torch.device, stored: torch.dtype) -> WanLiteStudent:
    """A student with memory for its weights, each where and as the levers want it. stored: the dtype that they are read in."""
    cuda = device.type == "cuda"
    dtype = stored if job.recipe.rank and cuda else torch.float32           # autocast computes in half precision, the CPU does not
    module = WanLiteStudent.from_wan(config, "meta", dtype).train()
    if job.recipe.rank:
        module.requires_grad_(False)
        if levers.frozen_float8:
            hold_in_float8(module, device)
    elif levers.optimizer_8bit and cuda:
        for name, parameter in module.named_parameters():
            if is_matrix(name, parameter):
                parameter.data = parameter.data.bfloat16()
    if levers.checkpointing:
        module.enable_gradient_checkpointing()
    module.checkpoints_on_cpu = levers.checkpoints_on_cpu
    lay_out(module, device, levers.swapped_blocks)
    return module


def state_of(job: DistillJob, module: WanLiteStudent, begin: Lora, levers: Levers) -> TrainState:
    """What is trained of a module that `empty_student` made, and with what. begin: factors to begin with, where adapters are trained."""
    adapters = critic = None
    if job.recipe.rank:
        adapters, critic = _adapters(job, module, begin)
    own = dict(module.named_parameters()) if adapters is None else adapters.parameters
    trained = {**own, **({} if critic is None else {f"critic.{name}": value for name, value in critic.parameters.items()})}
    average = WeightAverage(own, job.recipe.ema_decay, torch.device("cpu") if levers.optimizer_8bit else next(module.parameters()).device)
    optimizer = make_optimizer(trained, job.recipe, levers.optimizer_8bit, job.train_seed)
    released = Released(trained.values(), optimizer, job.recipe.max_grad_norm) if levers.gradient_release else None
    return TrainState(student=module, adapters=adapters, critic=critic, trained=trained, average=average, optimizer=optimizer, released=released)


def _adapters(job: DistillJob, module: WanLiteStudent, begin: Lora) -> tuple[Adapters, Adapters | None]:
    """The student's over the frozen module, and a critic's where one is needed."""
    def fresh(name: str) -> dict:
        return fresh_factors(module, job.recipe.rank, seeded(job.train_seed, name))

    adapters = Adapters(module, _widened(begin, fresh("adapters")), begin.diffs)
    return adapters, Adapters(module, fresh("critic"), enabled=False) if job.matching else None


def _widened(begin: Lora, fresh: Mapping[str, Factors]) -> dict[str, Factors]:
    """Its factors, with as many fresh ones beside them as they lack in rank; none is taken away."""
    rank_of = {path: len(found.down) for path, found in begin.factors.items()}
    lacking = {path: len(found.down) - rank_of.get(path, 0) for path, found in fresh.items()}
    beside = {path: replace(found, down=found.down[:lacking[path]], up=found.up[:, :lacking[path]]) for path, found in fresh.items() if lacking[path] > 0}
    return dict(stacked((begin, Lora(factors=beside))).factors)


def few_step_lora(job: DistillJob, handle: StudentHandle, teacher: Teacher, start_from: Lora | None) -> Lora:
    """What distribution matching goes on from. Raises WanLiteError unless the student is its teacher with one LoRA over it."""
    same, loras = handle.same_as == teacher.fingerprint, handle.loras
    if not same or len(loras) + (start_from is not None) != 1:
        raise WanLiteError("The student is not its teacher with one few-step LoRA over it.",
                           "Distribution matching sharpens what a few-step preset made at the teacher's own size.",
                           "Connect the student of such a run, or WanLite Create Student's at the same size and a few-step LoRA as start_from.")
    if loras and handle.card is not None and handle.card.steps != job.student_steps:
        raise WanLiteError(f"The student was made for {handle.card.steps} steps, and this job is for {job.student_steps}.", "",
                           "Choose the preset of its number of steps, or set student_steps in WanLite Recipe.")
    return start_from or read_lora(Path(loras[0]), handle.config)


def online_teacher(job: DistillJob, handle: StudentHandle, teacher: Teacher, state: TrainState) -> Teacher:
    """Who is asked while it trains: the student's own frozen base where that is the teacher as it is, so that one copy serves both."""
    if state.adapters is None or not _is_base(job, handle, teacher, state.adapters.diffs):
        return teacher
    return BaseTeacher(state.student, [part for part in (state.adapters, state.critic) if part], teacher)


def beside(job: DistillJob, handle: StudentHandle, teacher: Teacher, begin: Lora | None) -> WanConfig | None:
    """The teacher's architecture where it has to be in memory while the student trains: it is asked then, and is not the student's base."""
    asked = job.matching or job.recipe.objective == "velocity + features" or (job.recipe.own_states > 0 and not job.trajectory)
    return teacher.config if asked and not _is_base(job, handle, teacher, begin.diffs if begin else {}) else None


def _is_base(job: DistillJob, handle: StudentHandle, teacher: Teacher, diffs: Mapping[str, Tensor]) -> bool:
    """Whether what lies frozen under the student's adapters is the teacher."""
    merged = handle.loras and not job.matching
    return job.recipe.rank > 0 and not diffs and not merged and handle.same_as == teacher.fingerprint
