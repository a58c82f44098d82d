"""The end of a run: the best student written, what it is worth in plain words, and the same again from disk."""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch

from .. import flow
from ..compress.build import card_for
from ..compress.handle import StudentHandle
from ..formats.card import StudentCard
from ..formats.lora import Lora, write_lora
from ..formats.write import write_student
from ..prompts import HOLDOUT_PROMPTS, PromptBank
from ..teacher import AbsentTeacher, Teacher, fingerprint_tensors
from .checks import is_cut, untouched
from .checkpoint import RunFolder, TrainState
from .data import TeacherCache
from .evaluate import Held
from .events import Finished
from .job import DistillJob
from .levers import Levers
from .paths import own_sigmas, own_turns, state_counts

PLAIN_CUT, UNGUIDED = "plain cut of the same size", "teacher without guidance"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Held-out errors: of the best weights as they are handed out (rounded to bf16), of the start, and of what the student is compared with.

    yardstick: what the last is: the plain cut, or what stands for it.
    """
    best: Held
    start: Held
    plain: Held
    yardstick: str = PLAIN_CUT


def yardstick_of(job: DistillJob, handle: StudentHandle, teacher: Teacher, start_from: Lora | None) -> str:
    """What the student is compared with: the plain cut (the same size, sliced, untrained), or its own start where there is no other or that is one."""
    if start_from or job.matching:
        return "LoRA as it was"
    if not is_cut(handle, teacher) or isinstance(teacher, AbsentTeacher) and not untouched(handle, teacher):
        return "untrained student"
    ours, its = handle.config, teacher.config
    whole = (ours.num_layers, ours.ffn_dim) == (its.num_layers, its.ffn_dim)         # then what is cut is nothing
    return UNGUIDED if whole else PLAIN_CUT


def write_finished(job: DistillJob, files: RunFolder, start: StudentHandle, teacher: Teacher, state: TrainState, planned: int, asked: int,
                   cache: TeacherCache, prompts: PromptBank, measured: Measured) -> Finished:
    """Writes the best student into the run folder and notes the end, so that the same job returns at once. asked: steps that were asked for."""
    card = _card(job, start, teacher, measured, state)
    student, lora = files.student(state.step), files.lora(state.step)
    if state.adapters is None:
        write_student(student, config=start.config, tensors=files.best_weights(), card=card, overwrite=True)
        handle = replace(start, folder=str(student), loras=(), same_as="", fingerprint=fingerprint_tensors(files.best_weights()), card=card)
    else:
        write_lora(lora, Lora(factors=state.adapters.factors(dict(files.best_weights())), diffs=state.adapters.diffs), card=card)
        before = () if job.matching else start.loras        # it took the LoRA's place
        handle = replace(start, loras=(*before, str(lora)), fingerprint=fingerprint_tensors(files.best_weights(), start.fingerprint), card=card)
    report = _report(job, measured, state, planned, cache, prompts, Levers(**files.noted("levers")))
    files.note("finished", {"handle": handle.to_json(), "report": report, "step": state.step, "asked": asked, "plain_cut": measured.plain.error,
                            "yardstick": measured.yardstick})
    return finished_from_disk(files)


def finished_from_disk(files: RunFolder) -> Finished | None:
    """What the run ended with, or None while it has not."""
    noted = files.noted("finished")
    if noted is None:
        return None
    told, student, lora = noted["handle"], files.student(noted["step"]), files.lora(noted["step"])
    if not (student.exists() or lora.exists()):
        return None
    moved = {"loras": [*told["loras"][:-1], str(lora)]} if lora.exists() else {"folder": str(student)}
    return Finished(handle=StudentHandle.from_json({**told, **moved}), report=noted["report"],
                    losses=tuple(row["loss"] for row in files.rows("step")), plain_cut=noted["plain_cut"], yardstick=noted["yardstick"],
                    evaluations=tuple((row["step"], row["error"]) for row in files.rows("eval")))


def _card(job: DistillJob, start: StudentHandle, teacher: Teacher, measured: Measured, state: TrainState) -> StudentCard:
    recipe = {name: value for name, value in asdict(job.recipe).items() if not isinstance(value, str)}
    recipe |= {"cfg": job.cfg, "fold_guidance": int(job.fold_guidance), "train_steps": state.step, "train_seed": job.train_seed,
               "rank": state.adapters.rank if state.adapters else 0, "feature_kd": int(job.recipe.objective == "velocity + features"), "user_latents": int(bool(job.latents))}
    return card_for(teacher, start.plan, job.shape, role=job.role, steps=job.student_steps, cfg=job.student_cfg, recipe=recipe,
                    measured={"held_out_drift" if job.matching else "held_out_error": measured.best.error,
                              **({} if job.matching else {"plain_cut_error": measured.plain.error}), "best_step": state.best_step})


def _scheduler(job: DistillJob) -> str:
    """What the student was trained along, for a person: a card has no room for sigmas."""
    if job.sigmas is None or torch.allclose(torch.tensor(job.sigmas), flow.schedule(job.student_steps, job.shift), atol=1e-3):
        return "simple"
    return "the SIGMAS that were connected (the saved workflow says simple)"


def _as_expert(job: DistillJob) -> list[str]:
    if job.role is None:
        return []
    turns = own_turns(job)
    return [f"It is the expert of {job.role.side} noise: of the {job.student_steps} steps it makes {turns.start} to {turns.stop} (start_at_step and end_at_step of "
            "KSamplerAdvanced), and the other expert, or its student, the others. Trained and measured on these alone."]


def unasked(cache: TeacherCache, prompts: PromptBank) -> str:
    """A sentence where a job is too short for all of the prompts; else empty."""
    used, job = len({unit.prompt for unit in cache.units}), cache.job
    if used == len(prompts):
        return ""
    why = ("so few steps need no more." if job.steps else
           "the minutes allow no more. Give more minutes" + (", or set a lower renoised in WanLite Recipe." if state_counts(job)[1] else "."))
    return f"Only {used} of the {len(prompts)} prompts are used: {why}"


def _report(job: DistillJob, measured: Measured, state: TrainState, planned: int, cache: TeacherCache, prompts: PromptBank, levers: Levers) -> str:
    """Held-out numbers first; a falling training loss proves nothing."""
    target = f"the teacher at cfg {job.cfg:g}"
    held, plain, started = measured.best, measured.plain, measured.start
    held_prompts = {unit.prompt for unit in cache.held}
    apart = not held_prompts & {unit.prompt for unit in cache.train}
    on_what = (f"Measured on {held.states} states of {len(held_prompts)} prompts that are kept out of training, here and in every other job on these "
               "prompts." if apart else
               f"Measured on {held.states} states from other noise of the same prompts, since {HOLDOUT_PROMPTS} different prompts are needed "
               "to hold whole ones out: on new prompts the error may be larger.")
    end = "end of a clip" if own_sigmas(job)[-1] == 0 else "state that it hands over"
    what = ("clips' brightness, contrast, sharpness and motion against those of" if job.matching else
            f"{end}, after its own steps, against that of" if job.trajectory else "velocity against")
    other = measured.yardstick
    compared = (f"{plain.error / held.error:.1f} times below the {other}" if 0 < held.error < plain.error else
                f"not below the {other}" if held.error else "no error is left")
    lines = [
        f"Held-out {'drift' if job.matching else 'error'} of its {what} {target}: {held.error:.4f} (start {started.error:.4f}, {other} "
        f"{plain.error:.4f}): {compared}. 0 would be {'that none is left' if job.matching else 'the teacher itself'}.",
        on_what,
        "By sigma, from clean to noise: " + ", ".join("-" if math.isnan(b) else f"{b:.4f}" for b in held.buckets)
        + f" ({other} " + ", ".join("-" if math.isnan(b) else f"{b:.4f}" for b in plain.buckets) + ").",
        f"Best of {max(state.step, state.best_step)} steps ({planned} planned) was step {state.best_step}; that one was kept.",
        f"Sample with euler, {_scheduler(job)}, {job.student_steps} steps, "
        f"cfg {job.student_cfg:g}, shift {job.shift:g}.",
        *_as_expert(job),
    ]
    if job.fold_guidance and job.guided:
        way = ("" if job.trajectory else
               f": {held.closure:.0%} of the way from the unguided to the guided teacher" if held.closure > 0 else
               ": not yet, the unguided teacher is nearer to the guided one than this student is")
        lines.insert(3, f"Guidance folded in{way}. The negative prompt has no effect on this student.")
    if told := unasked(cache, prompts):
        lines.append(told)
    if levers != Levers():
        lines.append(f"To save memory: {levers.told()}.")
    if not job.guided and not job.grid_only:
        lines.append(f"The teacher was asked without guidance, along {job.path_steps} steps. One that was made for few steps has to be asked along its own: "
                     "set teacher_steps in WanLite Recipe.")
    if job.trajectory and job.path_steps != job.recipe.teacher_steps:
        lines.append(f"The teacher's path was followed in {job.path_steps} steps instead of {job.recipe.teacher_steps}: {job.substeps} to each of the "
                     "student's.")
    if state.best_step == 0:
        lines.append("No evaluation was better than the start: train longer, or lower the learning rate.")
    return "\n".join(lines)
