"""A distillation job from what a node was given, and its run with progress, samples and Cancel."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.distill.budget import amount
from ...wanlite_model.distill.checkpoint import RunFolder
from ...wanlite_model.distill.checks import lora_fingerprint
from ...wanlite_model.distill.data import check_latents, latents_fingerprint
from ...wanlite_model.distill.events import Eval, Event, Finished, Planned, Sample, Stage, Step
from ...wanlite_model.distill.finish import finished_from_disk
from ...wanlite_model.distill.inputs import Inputs, prepare
from ...wanlite_model.distill.job import DistillJob
from ...wanlite_model.distill.levers import LeverSettings
from ...wanlite_model.distill.presets import PRESETS
from ...wanlite_model.distill.trainer import run
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.experts import Other
from ...wanlite_model.formats.lora import Lora, read_lora
from ...wanlite_model.formats.place import check_name
from ...wanlite_model.prompts import PromptBank
from . import folders, jobs, memory
from .conditions import given_frames
from .disk import check_present
from .experts import expert_note, other_of
from .latents import check_vae, shape_of, training_latents
from .load import file_of
from .live import Live, clip_path
from .runtime import Bar, Board, drive, keep_clip, log, small
from .teacher import ComfyTeacher


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Training:
    """A job and the parts it is run with. Building it checks all that a link decides, before any work on the device."""
    job: DistillJob
    teacher: ComfyTeacher
    student: StudentHandle
    prompts: PromptBank
    latents: Tensor | None
    vae: Any
    start_from: Lora | None = None
    other: Other | None = None
    remark: tuple[str, ...] = ()

    @classmethod
    def of(cls, *, student: StudentHandle, model: Any, prompts: PromptBank, latent: dict, sigmas: Tensor | None, preset: str,
           changes: Mapping[str, Any], vae: Any, expert: str, other_expert: Any, **settings: Any) -> Training:
        """changes: to the preset's recipe, levers among them, a LoRA's name to start from, and the boundary between two experts. settings: of
        DistillJob. Raises WanLiteError when the parts do not belong together.
        """
        check_present(student)
        teacher = ComfyTeacher(model)
        its = teacher.config
        chosen, changes = PRESETS[preset], dict(changes)
        lora = changes.pop("start_from", None)
        boundary = changes.pop("boundary", 0.0)
        other = other_of(teacher, other_expert, expert, boundary, student.card)
        if boundary and other is None:
            raise WanLiteError(f"boundary is {boundary:g} in WanLite Recipe, and no other expert is connected.",
                               "It is where one of two experts takes over from the other.", "Set it to 0, or choose the expert and connect the other one.")
        levers = LeverSettings(**{field.name: changes.pop(field.name) for field in fields(LeverSettings) if field.name in changes})
        start_from = None if lora is None else read_lora(folders.lora_path(lora), student.config)
        shape, latents = shape_of(latent, its.out_dim), training_latents(latent, its.out_dim)
        check_vae(vae, its.out_dim)
        prompts = prompts.fitted(its, shape)
        if given_frames(latent) and not (prompts.shown and prompts.shown[0].given is not None):
            raise WanLiteError("The LATENT keeps its first frames, and the prompts were encoded without them.", "They are part of what this WAN is told.",
                               "Connect this LATENT to WanLite Encode Prompts too, or connect an empty one here.")
        check_latents(latents, prompts)
        if chosen.frames is not None and shape[1] != chosen.frames:
            raise WanLiteError(f"The preset '{preset}' is for one frame and the LATENT has {4 * (shape[1] - 1) + 1}.", "",
                               "Set length to 1 on the empty latent, or choose a preset for video.")
        job = DistillJob(student=student.fingerprint, teacher=teacher.fingerprint, prompts=prompts.fingerprint, shape=shape,
                         role=None if other is None else other.role, other="" if other is None else other.teacher.fingerprint, shift=teacher.shift,
                         latents=latents_fingerprint(latents), recipe=replace(chosen.recipe, **changes), levers=levers,
                         fold_guidance=chosen.fold_guidance, start_from="" if start_from is None else lora_fingerprint(start_from),
                         sigmas=None if sigmas is None else tuple(float(sigma) for sigma in sigmas), **settings)
        its_own = replace(job, sigmas=None).student_steps
        if job.trajectory and job.student_steps != its_own:
            raise WanLiteError(f"The SIGMAS have {job.student_steps} steps and the student is to have {its_own}.",
                               "With a few-step preset they are the student's own noise levels.",
                               f"Connect SIGMAS of {its_own} steps, or leave the input open.")
        return cls(job=job, teacher=teacher, student=student, prompts=prompts, latents=latents, vae=vae, start_from=start_from, other=other,
                   remark=() if student.card else expert_note(its, other, expert))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report says beside the engine's: what was left out of the teacher, and a guidance scale that the student was not made for."""
        card = self.student.card
        meant = self.job.cfg if card is None else card.recipe.get("cfg", card.cfg)      # a card's own cfg is 1 where guidance is folded in
        told = f"The student was made for a teacher at cfg {meant:g}; this run asked its teacher at cfg {self.job.cfg:g}."
        others = () if self.other is None else self.other.teacher.notes
        return (*self.teacher.notes, *others, *self.remark, *([told] if meant != self.job.cfg else []))

    def run(self, folder: Path, cache: Path, node_id: str | None) -> Finished | None:
        """Runs to the end, or goes on with what the folder holds; with minutes 0 only prepares it, and returns what it ended with elsewhere, or None.

        Raises WanLiteError, or ComfyUI's own exception on Cancel.
        """
        check_name(folder.name, "a run")
        files, ended, peaks = RunFolder(folder), [], []
        live = Live(files, node_id or "", self.job)
        bar, board, clips = Bar(node_id), Board(live), Clips(self.vae, self.teacher.model.get_model_object("latent_format"), folder)

        def show(event: Event) -> None:
            if isinstance(event, Stage):
                bar.show(event.name, event.done, event.total)
            elif isinstance(event, Planned):
                peaks.extend([event.budget.peaks] if event.budget.peaks else [])
                log.info("WanLite: %s", event.told)
            elif isinstance(event, Step):
                job.trains = True
                bar.show("training", event.step, event.total)
            elif isinstance(event, Eval):
                log.info("WanLite: step %d, held-out error %.4f (to compare: %.4f)%s", event.step, event.held.error, event.plain_cut.error,
                         ", the best so far" if event.best else "")
            elif isinstance(event, Sample):
                clips.keep(event)
            elif isinstance(event, Finished):
                ended.append(event)
            board.show(event)

        def leaving() -> None:
            if job.trains:
                board.tell(f"Saving {amount(peaks[-1].saved)} to {folder.name}. Queue the same graph again to go on." if peaks else f"Saving to {folder.name}.")

        try:
            with jobs.running(folder.name, live) as job:
                work = self._preparing(files, cache) if self.job.minutes == 0 else run(
                    self.job, folder, cache, self.teacher, self.student, self.prompts, self.latents, should_finish=lambda: job.finish,
                    samples=self.vae is not None, start_from=self.start_from, other=self._other)
                drive(work, show, leaving)
        finally:
            live.leave()
            board.send()
            memory.release()
        return finished_from_disk(files) if self.job.minutes == 0 else ended[0]

    def _preparing(self, files: RunFolder, cache: Path) -> Iterator[Stage]:
        parts = Inputs(student=self.student, prompts=self.prompts, latents=self.latents, start_from=self.start_from)
        for stage in prepare(files, self.job, parts, self.teacher, cache, file_of, self._other):
            yield Stage(name=stage, done=0, total=1)

    @property
    def _other(self) -> ComfyTeacher | None:
        return None if self.other is None else self.other.teacher


class Clips:
    """What is drawn at evaluations, decoded by the user's VAE; the teacher's, which stays the same, once."""

    def __init__(self, vae: Any, latent_format: Any, folder: Path) -> None:
        self._vae, self._format, self._folder = vae, latent_format, folder
        self._teacher: list[Image.Image] = []

    def keep(self, sample: Sample) -> None:
        """As one clip in the run's folder. A VAE that fails, or does not fit beside the job, costs the clip and not the job."""
        try:
            student = self._decoded(sample.latents)
            if sample.teacher is not None and not self._teacher:
                self._teacher = self._decoded(sample.teacher)
        except (RuntimeError, ValueError) as error:             # torch's for a lack of memory among them
            log.warning("WanLite: there is no clip of step %d (%s: %s).", sample.step, type(error).__name__, error)
        else:
            keep_clip([self._teacher, student] if self._teacher else [student], clip_path(self._folder, sample.step))
        finally:
            memory.unload(getattr(self._vae, "patcher", None))          # its room was not planned for; other packs' VAEs may have none
            memory.release()

    def _decoded(self, latents: Tensor) -> list[Image.Image]:
        """The frames of a sample [1, C, T, H, W] in processed space."""
        with torch.inference_mode():
            decoded = self._vae.decode(self._format.process_out(latents))
        return small(decoded.reshape(-1, *decoded.shape[-3:]))
