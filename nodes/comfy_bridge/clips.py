"""Clips of one MODEL, or of one of 2.2's two experts with the other beside it, by ComfyUI's own sampling; timed, and kept where they will be asked for again."""
from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...wanlite_model.cond import Shown
from ...wanlite_model.config import WanConfig
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.files import replace_file
from ...wanlite_model.prompts import PromptBank
from ...wanlite_model.roles import Role
from . import folders
from .conditions import conditioning, still_frames
from .experts import expert_note, role_of
from .teacher import ComfyTeacher, check_variant, config_of


class How(NamedTuple):
    """ComfyUI's names of the sampler and the scheduler."""
    sampler: str
    scheduler: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Half:
    """A MODEL with a number of steps and a guidance scale."""
    model: Any
    steps: int
    cfg: float

    def sigmas(self, how: How) -> Tensor:
        """The noise levels of all its steps, as KSampler takes them."""
        return comfy.samplers.KSampler(self.model, self.steps, torch.device("cpu"), *how).sigmas


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contender(Half):
    """One MODEL and how it is sampled. other: the other expert of 2.2, which makes the steps on the other side of the role's boundary. remark: for
    the user.
    """
    name: str
    config: WanConfig
    role: Role | None = None
    other: Half | None = None
    remark: tuple[str, ...] = ()

    def parts(self, how: How) -> tuple[tuple[Half, Tensor | None], ...]:
        """Who samples along which noise levels, in this order; None are all of its own.

        Where one hands over to the other is one of this MODEL's own levels, as in the workflow that is saved with a student. Raises WanLiteError where it has all steps, or none.
        """
        if self.role is None or self.other is None:
            return ((self, None),)
        own, its = self.sigmas(how), self.other.sigmas(how)
        above = len(Role(side="high", boundary=self.role.boundary).turns(own))
        if not 0 < above < len(own) - 1:
            raise WanLiteError(f"All {len(own) - 1} steps of the {self.name} lie on one side of the boundary {self.role.boundary:g}.",
                               "Each of the two experts makes at least one.", "Set its shift with ModelSamplingSD3, or more steps.")
        level = own[above:above + 1]
        if self.role.side == "high":
            return (self, own[:above + 1]), (self.other, torch.cat([level, its[its < level]]))
        return (self.other, torch.cat([its[its > level], level])), (self, own[above:])


def contenders(asked: Mapping[str, tuple[Any, int, float]], other: Any, choice: str, boundary: float) -> list[Contender]:
    """Of {name: (MODEL, steps, cfg)}, the teacher first, whose steps and cfg the other expert takes.

    Raises WanLiteError unless all are WANs that students can be made of, and it was said which of two experts they are where they can only be that.
    """
    models = [model for model, _, _ in asked.values()]
    for model in (*models, *([] if other is None else [other])):
        check_variant(model)
    configs = [config_of(model.model.diffusion_model) for model in models]
    role = role_of(configs[0], other, choice, boundary)
    _, steps, cfg = next(iter(asked.values()))
    beside = None if role is None else Half(model=other, steps=steps, cfg=cfg)
    if role is not None and (its := config_of(other.model.diffusion_model)).in_dim != configs[0].in_dim:
        raise WanLiteError(f"The other expert takes {its.in_dim} channels and the teacher {configs[0].in_dim}.", "One video is made by both.",
                           "Connect the two files of one model.")
    return [Contender(name=name, model=model, steps=steps, cfg=cfg, config=config, role=role, other=beside,
                      remark=expert_note(config, other, choice))
            for (name, (model, steps, cfg)), config in zip(asked.items(), configs)]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clip:
    """latents [1, C, T, H, W] in VAE space, seconds of sampling them; kept: whether they were made for an earlier comparison."""
    latents: Tensor
    seconds: float
    kept: bool = False


def drawn(one: Contender, prompts: PromptBank, shape: tuple[int, ...], how: How, clips: int, noise_number: int, keep: bool = False) -> Iterator[Clip]:
    """Each clip; before the first that is sampled each MODEL makes one step that nobody times, which loads and warms it. keep: on disk, or from there."""
    prompts, parts = prompts.fitted(one.config, shape), one.parts(how)
    shelf = _shelf(one, parts, how, shape) if keep else None
    device = comfy.model_management.intermediate_device()

    def sample(index: int, most: int | None = None) -> Tensor:
        shown = prompts.shown[index] if prompts.shown else Shown()
        samples, mask = still_frames(shown, shape)
        noise = comfy.sample.prepare_noise(samples, noise_number + index)
        positive, negative = (conditioning(context, shown) for context in (prompts.contexts[index], prompts.negative))
        for number, (half, sigmas) in enumerate(parts):
            samples = comfy.sample.sample(half.model, noise if number == 0 else torch.zeros_like(noise), most or half.steps, half.cfg, *how, positive, negative,
                                          samples.to(device), sigmas=sigmas if most is None or sigmas is None else sigmas[:most + 1],
                                          noise_mask=mask, seed=noise_number + index, disable_pbar=True)
        return samples

    warm = False
    for index in range(clips):
        place = shelf and _place(shelf, prompts, index, noise_number + index)
        if place and (kept := _read(place)) is not None:
            yield kept
            continue
        if not warm:
            sample(0, most=1)
            warm = True
        _finish()
        begun = time.perf_counter()
        latents = sample(index)
        _finish()
        clip = Clip(latents=latents, seconds=time.perf_counter() - begun)
        if place:
            told = {"seconds": f"{clip.seconds:.6f}"}
            replace_file(place, lambda path: save_file({"latents": latents.cpu().contiguous()}, path, metadata=told))
        yield clip


def _finish() -> None:
    """Waits for the device: it works behind our back."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _shelf(one: Contender, parts: tuple[tuple[Half, Tensor | None], ...], how: How, shape: tuple[int, ...]) -> str | None:
    """What tells its clips from others; None where a MODEL does more than its weights say, or cannot be told from others."""
    try:
        teachers = [ComfyTeacher(half.model) for half, _ in parts]
    except WanLiteError:
        return None
    if any(teacher.left_out for teacher in teachers):
        return None
    told = [f"{teacher.fingerprint} {teacher.shift} {half.steps, half.cfg}" for teacher, (half, _) in zip(teachers, parts)]
    return f"{' '.join(told)} {one.role} {(*how, shape)}"


def _place(shelf: str, prompts: PromptBank, index: int, number: int) -> Path:
    negative = prompts.negative
    told = hashlib.sha256(f"{shelf} {number} {prompts.key(index)} {tuple(negative.shape)}".encode())
    told.update(negative.float().contiguous().numpy().tobytes())
    return folders.output_folder("cache") / "compare" / f"{told.hexdigest()[:24]}.safetensors"


def _read(place: Path) -> Clip | None:
    """A kept clip, or None when it is not there or not whole."""
    try:
        with safe_open(place, "pt") as stored:
            return Clip(latents=stored.get_tensor("latents").clone(), seconds=float(stored.metadata()["seconds"]), kept=True)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
