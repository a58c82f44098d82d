"""A distillation job from what a node was given, and its run with progress, samples and Cancel."""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.distill.data import check_latents, latents_fingerprint
from ...wanlite_model.distill.events import Eval, Event, Finished, Sample, Stage, Step
from ...wanlite_model.distill.job import DistillJob, Recipe
from ...wanlite_model.distill.trainer import run
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.keymap import wan_shapes
from ...wanlite_model.formats.place import check_name
from ...wanlite_model.prompts import PromptBank
from . import memory
from .latents import shape_of, training_latents
from .runtime import Bar, drive, log
from .teacher import ComfyTeacher

BYTES_A_PARAMETER = 20          # fp32: weights, gradients, AdamW's two moments, the average
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

    @classmethod
    def of(cls, *, student: StudentHandle, model: Any, prompts: PromptBank, latent: dict, sigmas: Tensor | None, recipe: Recipe | None,
           vae: Any, **settings: Any) -> Training:
        """settings: of DistillJob. Raises WanLiteError when the parts do not belong together."""
        teacher = ComfyTeacher(model)
        ours, its = student.config, teacher.config
        if (ours.in_dim, ours.out_dim) != (its.in_dim, its.out_dim):
            raise WanLiteError(f"The student has {ours.in_dim} latent channels and the teacher {its.in_dim}.", "", "Connect a teacher of its kind.")
        shape, latents = shape_of(latent, its.in_dim), training_latents(latent, model, its.in_dim)
        check_latents(latents, prompts)
        job = DistillJob(student=student.fingerprint, teacher=teacher.fingerprint, prompts=prompts.fingerprint, shape=shape,
                         shift=teacher.shift, latents=latents_fingerprint(latents), recipe=recipe or Recipe(),
                         sigmas=None if sigmas is None else tuple(float(sigma) for sigma in sigmas), **settings)
        return cls(job=job, teacher=teacher, model=model, student=student, prompts=prompts, latents=latents, vae=vae)

    def run(self, folder: Path, cache: Path, node_id: str | None) -> Finished:
        """Runs to the end, or goes on with what the folder holds. Raises WanLiteError, or ComfyUI's own exception on Cancel."""
        check_name(folder.name)
        bar, ended = Bar(node_id), []

        def show(event: Event) -> None:
            if isinstance(event, Stage):
                if event.name == LOADING:
                    memory.make_room(self._bytes())
                bar.show(event.name, event.done, event.total)
            elif isinstance(event, Step):
                bar.show("training", event.step, event.total)
            elif isinstance(event, Eval):
                log.info("WanLite: step %d, held-out error %.4f (plain cut %.4f)%s", event.step, event.held.error, event.plain_cut.error,
                         ", the best so far" if event.best else "")
            elif isinstance(event, Sample):
                bar.preview(self._frame(event.latents))
            elif isinstance(event, Finished):
                ended.append(event)

        try:
            drive(run(self.job, folder, cache, self.teacher, self.student, self.prompts, self.latents, samples=self.vae is not None), show)
        finally:
            memory.release()
        return ended[0]

    def _bytes(self) -> int:
        parameters = sum(math.prod(shape) for shape in wan_shapes(self.student.config).values())
        return BYTES_A_PARAMETER * parameters + ACTIVATIONS

    def _frame(self, latents: Tensor) -> Tensor:
        """The middle frame [H, W, 3] of a sample [1, C, T, H, W] in processed space."""
        with torch.inference_mode():
            decoded = self.vae.decode(self.model.get_model_object("latent_format").process_out(latents))
        frames = decoded.reshape(-1, *decoded.shape[-3:])                                       # [frames, H, W, 3]
        return frames[len(frames) // 2]
