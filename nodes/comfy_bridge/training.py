"""A distillation job from what a node was given, and its run with progress, samples and Cancel."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.distill.adapters import adapter_size
from ...wanlite_model.distill.data import check_latents, latents_fingerprint
from ...wanlite_model.distill.events import Eval, Event, Finished, Sample, Stage, Step
from ...wanlite_model.distill.job import DistillJob
from ...wanlite_model.distill.presets import PRESETS
from ...wanlite_model.distill.trainer import lora_fingerprint, run
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.lora import Lora, read_lora
from ...wanlite_model.formats.place import check_name
from ...wanlite_model.prompts import PromptBank
from . import folders, memory
from .latents import shape_of, training_latents
from .runtime import Bar, drive, log
from .teacher import ComfyTeacher

BYTES_A_PARAMETER = {"AdamW": 24, "Muon": 17}       # fp32: weights, gradients, average; AdamW's two moments and its temporary, or Muon's one moment and a little
FROZEN_BYTES = 2                # of a parameter under adapters
ACTIVATIONS = 2 * 2**30
LOADING = "loading the student"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Training:
    """A job and the parts it is run with. Building it checks all that a link decides, before any work on the device."""
    job: DistillJob
    teacher: ComfyTeacher
    model: Any
    student: StudentHandle
    prompts: PromptBank
    latents: Tensor | None
    vae: Any
    start_from: Lora | None = None

    @classmethod
    def of(cls, *, student: StudentHandle, model: Any, prompts: PromptBank, latent: dict, sigmas: Tensor | None, preset: str,
           changes: Mapping[str, Any], vae: Any, **settings: Any) -> Training:
        """changes: to the preset's recipe, and a LoRA's name to start from. settings: of DistillJob. Raises WanLiteError when the parts do not
        belong together.
        """
        teacher = ComfyTeacher(model)
        its = teacher.config
        chosen, changes = PRESETS[preset], dict(changes)
        lora = changes.pop("start_from", None)
        start_from = None if lora is None else read_lora(folders.lora_path(lora), student.config)
        shape, latents = shape_of(latent, its.in_dim), training_latents(latent, model, its.in_dim)
        check_latents(latents, prompts)
        if chosen.frames is not None and shape[1] != chosen.frames:
            raise WanLiteError(f"The preset '{preset}' is for one frame and the LATENT has {4 * (shape[1] - 1) + 1}.", "",
                               "Set length to 1 on the empty latent, or choose a preset for video.")
        job = DistillJob(student=student.fingerprint, teacher=teacher.fingerprint, prompts=prompts.fingerprint, shape=shape,
                         shift=teacher.shift, latents=latents_fingerprint(latents), recipe=replace(chosen.recipe, **changes),
                         fold_guidance=chosen.fold_guidance, start_from="" if start_from is None else lora_fingerprint(start_from),
                         sigmas=None if sigmas is None else tuple(float(sigma) for sigma in sigmas), **settings)
        its_own = replace(job, sigmas=None).student_steps
        if job.trajectory and job.student_steps != its_own:
            raise WanLiteError(f"The SIGMAS have {job.student_steps} steps and the student is to have {its_own}.",
                               "With a few-step preset they are the student's own noise levels.",
                               f"Connect SIGMAS of {its_own} steps, or leave the input open.")
        return cls(job=job, teacher=teacher, model=model, student=student, prompts=prompts, latents=latents, vae=vae, start_from=start_from)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report says beside the engine's: what was left out of the teacher, and a guidance scale that the student was not made for."""
        card = self.student.card
        meant = self.job.cfg if card is None else card.recipe.get("cfg", card.cfg)      # a card's own cfg is 1 where guidance is folded in
        told = f"The student was made for a teacher at cfg {meant:g}; this run asked its teacher at cfg {self.job.cfg:g}."
        return (*self.teacher.notes, *([told] if meant != self.job.cfg else []))

    def run(self, folder: Path, cache: Path, node_id: str | None) -> Finished:
        """Runs to the end, or goes on with what the folder holds. Raises WanLiteError, or ComfyUI's own exception on Cancel."""
        check_name(folder.name, "a run")
        bar, ended = Bar(node_id), []

        def show(event: Event) -> None:
            if isinstance(event, Stage):
                if event.name == LOADING:
                    memory.make_room(self._bytes())
                bar.show(event.name, event.done, event.total)
            elif isinstance(event, Step):
                bar.show("training", event.step, event.total)
            elif isinstance(event, Eval):
                log.info("WanLite: step %d, held-out error %.4f (to compare: %.4f)%s", event.step, event.held.error, event.plain_cut.error,
                         ", the best so far" if event.best else "")
            elif isinstance(event, Sample):
                bar.preview(self._frame(event.latents))
            elif isinstance(event, Finished):
                ended.append(event)

        try:
            drive(run(self.job, folder, cache, self.teacher, self.student, self.prompts, self.latents, samples=self.vae is not None,
                      start_from=self.start_from), show)
        finally:
            memory.release()
        return ended[0]

    def _bytes(self) -> int:
        size, rank = memory.parameters(self.student.config), self.job.recipe.rank
        if not rank:
            return BYTES_A_PARAMETER[self.job.recipe.optimizer] * size + ACTIVATIONS
        adapters = adapter_size(self.student.config, rank) * (2 if self.job.matching else 1)            # the critic has as many
        return FROZEN_BYTES * size + BYTES_A_PARAMETER["AdamW"] * adapters + ACTIVATIONS

    def _frame(self, latents: Tensor) -> Tensor:
        """The middle frame [H, W, 3] of a sample [1, C, T, H, W] in processed space."""
        with torch.inference_mode():
            decoded = self.vae.decode(self.model.get_model_object("latent_format").process_out(latents))
        frames = decoded.reshape(-1, *decoded.shape[-3:])                                       # [frames, H, W, 3]
        return frames[len(frames) // 2]
