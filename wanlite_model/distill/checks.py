"""What a job is refused for before it begins, each in a sentence."""
from __future__ import annotations

from torch import Tensor

from ..compress.handle import StudentHandle
from ..config import WanConfig
from ..errors import WanLiteError
from ..formats.lora import Lora
from ..prompts import PromptBank
from ..teacher import Teacher, fingerprint_tensors
from .begin import few_step_lora
from .data import check_latents
from .job import DistillJob
from .paths import own_turns


def check(job: DistillJob, handle: StudentHandle, teacher: Teacher, prompts: PromptBank, latents: Tensor | None, start_from: Lora | None) -> None:
    """Raises WanLiteError where the parts are not those that the job was made for, or there is nothing that it could do with them.

    prompts: fitted to the teacher.
    """
    check_latents(latents, prompts)
    _check_parts(job, handle, teacher, prompts, start_from)
    ours, its = handle.config, teacher.config
    if (ours.in_dim, ours.out_dim, ours.img_emb) != (its.in_dim, its.out_dim, its.img_emb):
        raise WanLiteError(f"The student is a WAN {_kind(ours)} and the teacher is {_kind(its)}.",
                           "They must be told the same and speak of the same latents.", "Choose a student of the same WAN family.")
    if _knows_it_all(job, handle, teacher, start_from):
        raise WanLiteError("The student is its teacher, whole, and is asked for what that does already.", "",
                           "Type the cfg that you sample with and fold it in, take blocks away with WanLite Create Student, or choose a preset with fewer steps.")
    if job.recipe.objective == "velocity + features" and not is_cut(handle, teacher):
        raise WanLiteError(f"The student is no part of this teacher: {ours.num_layers} blocks of {ours.dim} beside {its.num_layers} of {its.dim}.",
                           "Block features can only be compared between a teacher and what was cut from it.", "Choose another objective.")
    own_turns(job)
    if job.matching:
        few_step_lora(job, handle, teacher, start_from)
    _check_shape(job.shape, teacher)


def untouched(handle: StudentHandle, teacher: Teacher) -> bool:
    """Whether the start is the teacher itself."""
    return handle.same_as == teacher.fingerprint and not handle.loras


def is_cut(handle: StudentHandle, teacher: Teacher) -> bool:
    """Whether the student can have been cut from this teacher; any other WAN of the same latents can learn from it too."""
    ours, its = handle.config, teacher.config
    return ours.dim == its.dim and max(handle.plan.keep) < its.num_layers and ours.ffn_dim <= its.ffn_dim


def lora_fingerprint(lora: Lora) -> str:
    """What `DistillJob.start_from` holds."""
    return fingerprint_tensors(lora.tensors())


def _kind(config: WanConfig) -> str:
    return f"{config.model_type} ({config.in_dim} channels in, {config.out_dim} out{', with CLIP vision' if config.img_emb else ''})"


def _check_parts(job: DistillJob, handle: StudentHandle, teacher: Teacher, prompts: PromptBank, start_from: Lora | None) -> None:
    given = {"student": handle.fingerprint, "teacher": teacher.fingerprint, "prompts": prompts.fingerprint,
             "start_from": "" if start_from is None else lora_fingerprint(start_from)}
    for name, fingerprint in given.items():
        if getattr(job, name) != fingerprint:
            raise WanLiteError(f"The job was made for {name} {getattr(job, name)} and was given {fingerprint}.", "",
                               "Build the job from the parts it is run with.")


def _check_shape(shape: tuple[int, int, int, int], teacher: Teacher) -> None:
    channels, _, height, width = shape
    if channels != teacher.config.out_dim:
        raise WanLiteError(f"The latents have {channels} channels; this teacher's have {teacher.config.out_dim}.", "",
                           "Make them with WAN's empty latent node, or encode pictures with WAN's VAE.")
    if height % 2 or width % 2:
        raise WanLiteError(f"The latents are {width} x {height}.", "WAN needs an even width and height in latents.",
                           "Choose a width and a height that are multiples of 16 pixels.")


def _knows_it_all(job: DistillJob, handle: StudentHandle, teacher: Teacher, start_from: Lora | None) -> bool:
    """Whether the student is its teacher and is asked for what that does itself: no guidance to fold in, no steps to save."""
    return untouched(handle, teacher) and not start_from and not (job.guided and job.fold_guidance) and job.substeps == 1 and not job.matching
