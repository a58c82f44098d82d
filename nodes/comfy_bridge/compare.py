"""Clips of several MODELs from the same noise, by ComfyUI's own sampling, and what they cost."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.prompts import PromptBank
from .latents import shape_of
from .runtime import Bar
from .teacher import check_variant
from .text import conditioning

LABEL = 28          # height of the line of text above the pictures
GAP = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contender:
    """One MODEL and how it is sampled."""
    name: str
    model: Any
    steps: int
    cfg: float
    channels: int

    @classmethod
    def of(cls, name: str, model: Any, steps: int, cfg: float) -> Contender:
        """Raises WanLiteError unless the MODEL is a WAN text-to-video model."""
        check_variant(model)
        return cls(name=name, model=model, steps=steps, cfg=cfg, channels=model.model.diffusion_model.in_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """seconds: median of a warm clip, sampling alone. bytes: of the weights as held. psnr: of the clips against the first MODEL's, in dB."""
    name: str
    parameters: int
    bytes: int
    seconds: float
    psnr: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """images [frames of all clips, H, W, 3], the MODELs side by side; measured: in the order they were given."""
    images: Tensor
    text: str
    measured: tuple[Measured, ...]


def compare(contenders: Sequence[Contender], *, prompts: PromptBank, vae: Any, latent: dict, sampler: str, scheduler: str, clips: int,
            noise_number: int, node_id: str | None) -> Comparison:
    """Samples the first `clips` prompts with each. Raises WanLiteError when there are fewer prompts, or the LATENT is not WAN's."""
    shape = shape_of(latent, contenders[0].channels)
    if clips > len(prompts):
        raise WanLiteError(f"clips is {clips} and there are {len(prompts)} prompts.", "", f"Set clips to at most {len(prompts)}.")
    bar, done = Bar(node_id), 0
    videos: list[list[Tensor]] = []
    seconds: list[float] = []
    for one in contenders:
        latents, times = [], []
        for drawn, taken in _drawn(one, prompts, shape, sampler, scheduler, clips, noise_number):
            latents.append(drawn)
            times.append(taken)
            bar.show("comparing", done := done + 1, clips * len(contenders))
        seconds.append(statistics.median(times))
        videos.append([_frames(vae, drawn) for drawn in latents])
    measured = tuple(Measured(name=one.name, parameters=_parameters(one.model), bytes=int(one.model.model_size()), seconds=taken,
                              psnr=_psnr(own, videos[0])) for one, taken, own in zip(contenders, seconds, videos))
    labels = [f"{one.name}: {one.steps} steps, cfg {one.cfg:g}, {m.seconds:.2f} s" for one, m in zip(contenders, measured)]
    images = torch.cat([_beside([own[i] for own in videos], labels) for i in range(clips)])
    return Comparison(images=images, text=_text(contenders, measured, shape, clips), measured=measured)


def _drawn(one: Contender, prompts: PromptBank, shape: tuple[int, ...], sampler: str, scheduler: str, clips: int,
           noise_number: int) -> Iterator[tuple[Tensor, float]]:
    """(latents [1, C, T, H, W] in VAE space, seconds) of each clip, after one step that nobody times: it loads the model and warms it."""
    empty = torch.zeros(1, *shape, device=comfy.model_management.intermediate_device())
    negative = conditioning(prompts.negative)

    def sample(index: int, steps: int) -> Tensor:
        noise = comfy.sample.prepare_noise(empty, noise_number + index)
        return comfy.sample.sample(one.model, noise, steps, one.cfg, sampler, scheduler, conditioning(prompts.contexts[index]), negative,
                                   empty, seed=noise_number + index, disable_pbar=True)

    sample(0, 1)
    for index in range(clips):
        _finish()
        begun = time.perf_counter()
        drawn = sample(index, one.steps)
        _finish()
        yield drawn, time.perf_counter() - begun


def _finish() -> None:
    """Waits for the device: it works behind our back."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _frames(vae: Any, latents: Tensor) -> Tensor:
    """[frames, H, W, 3] in 0..1."""
    decoded = vae.decode(latents)
    return decoded.reshape(-1, *decoded.shape[-3:]).float().cpu().clamp(0, 1)


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.model.diffusion_model.parameters())


def _psnr(own: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Of all clips together; infinite for equal ones."""
    error = statistics.fmean(float((a - b).square().mean()) for a, b in zip(own, reference))
    return math.inf if error == 0 else -10 * math.log10(error)


def _beside(videos: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """Clips [frames, H, W, 3] of one prompt -> [frames, LABEL + H, all W, 3]."""
    frames, height, width, _ = videos[0].shape
    total = len(videos) * (width + GAP) - GAP
    canvas = torch.zeros(frames, LABEL + height, total, 3)
    header = Image.new("RGB", (total, LABEL))
    draw = ImageDraw.Draw(header)
    for i, (video, label) in enumerate(zip(videos, labels)):
        left = i * (width + GAP)
        size = next((s for s in (18, 14, 11, 9, 7) if draw.textlength(label, font=ImageFont.load_default(s)) <= width), 7)
        draw.text((left + 2, LABEL / 2), label, fill="white", font=ImageFont.load_default(size), anchor="lm")
        canvas[:, LABEL:, left:left + width] = video
    canvas[:, :LABEL] = torch.from_numpy(numpy.asarray(header, dtype="float32") / 255)
    return canvas


def _text(contenders: Sequence[Contender], measured: Sequence[Measured], shape: tuple[int, ...], clips: int) -> str:
    first, lines = measured[0], []
    for one, m in zip(contenders, measured):
        line = (f"{m.name}: {one.steps} steps, cfg {one.cfg:g}; {m.parameters / 1e6:,.2f} M parameters, {m.bytes / 2**20:,.1f} MiB; "
                f"{m.seconds:.3f} s a clip (warm, median of {clips})")
        if m is not first:
            psnr = "equal to the teacher's" if math.isinf(m.psnr) else f"{m.psnr:.1f} dB from the teacher's"
            line += f", {first.seconds / m.seconds:.2f} times as fast; clips {psnr} (PSNR)"
        lines.append(f"{line}.")
    return "\n".join((*lines, f"{clips} clips of latent size {' x '.join(map(str, shape))}, the same noise for all."))
