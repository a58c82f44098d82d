"""Clips of several MODELs from the same noise, by ComfyUI's own sampling, and what they cost."""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.prompts import PromptBank
from .clips import Contender, How, drawn
from .latents import check_vae, shape_of
from .runtime import Bar

LABEL = 28          # height of the line of text above the pictures
GAP = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """seconds: median of a warm clip, sampling alone. bytes: of the weights as held. Against the first MODEL's clips: psnr in dB, and the
    ratios of motion (nan for stills) and sharpness, where below 1 is less. kept: how many clips are of an earlier comparison.
    """
    name: str
    parameters: int
    bytes: int
    seconds: float
    psnr: float
    motion: float
    sharpness: float
    kept: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """images [frames of all clips, H, W, 3], the MODELs side by side; measured: in the order they were given."""
    images: Tensor
    text: str
    measured: tuple[Measured, ...]


def compare(contenders: Sequence[Contender], *, prompts: PromptBank, vae: Any, latent: dict, how: How, clips: int, noise_number: int,
            node_id: str | None) -> Comparison:
    """Samples the first `clips` prompts with each. Raises WanLiteError when there are fewer prompts, or the LATENT is not WAN's."""
    shape = shape_of(latent, contenders[0].config.out_dim)
    _check(contenders, prompts, vae, shape, how)
    if clips > len(prompts):
        raise WanLiteError(f"clips is {clips} and there are {len(prompts)} prompts.", "", f"Set clips to at most {len(prompts)}.")
    bar, done = Bar(node_id), 0
    videos: list[list[Tensor]] = []
    measured: list[Measured] = []
    for one in contenders:
        found = []
        # The teacher stays the same from one student to the next: its clips are kept.
        for clip in drawn(one, prompts, shape, how, clips, noise_number, keep=one is contenders[0]):
            found.append(clip)
            bar.show("comparing", done := done + 1, clips * len(contenders))
        videos.append([_frames(vae, clip.latents) for clip in found])
        own, first = videos[-1], videos[0]
        measured.append(Measured(name=one.name, parameters=_parameters(one.model), bytes=int(one.model.model_size()), psnr=_psnr(own, first),
                                 seconds=statistics.median(clip.seconds for clip in found), motion=_ratio(_motion, own, first),
                                 sharpness=_ratio(_sharpness, own, first), kept=sum(clip.kept for clip in found)))
    labels = [f"{one.name}: {one.steps} steps, cfg {one.cfg:g}, {m.seconds:.2f} s" for one, m in zip(contenders, measured)]
    images = torch.cat([_beside([own[i] for own in videos], labels) for i in range(clips)])
    return Comparison(images=images, text=_text(contenders, measured, shape, clips), measured=tuple(measured))


def _check(contenders: Sequence[Contender], prompts: PromptBank, vae: Any, shape: tuple[int, int, int, int], how: How) -> None:
    """Raises WanLiteError where what is connected does not belong together: before the first clip, which may take minutes."""
    check_vae(vae, shape[0])
    for one in contenders:
        if one.config.out_dim != shape[0]:
            raise WanLiteError(f"The {one.name} MODEL makes latents of {one.config.out_dim} channels, and the {contenders[0].name} of {shape[0]}.",
                               "All of them start from the same noise.", "Connect MODELs of one kind of WAN.")
        prompts.fitted(one.config, shape)
        one.parts(how)


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


def _ratio(statistic: Callable[[Tensor], float], own: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Of the statistic's means over the clips; nan where the reference has none of it."""
    other = statistics.fmean(map(statistic, reference))
    return statistics.fmean(map(statistic, own)) / other if other > 0 else math.nan


def _motion(clip: Tensor) -> float:
    """Mean size of the difference between neighbouring frames [frames, H, W, 3]."""
    return float(clip.diff(dim=0).abs().mean()) if len(clip) > 1 else 0.0


def _sharpness(clip: Tensor) -> float:
    """Mean size of the difference between neighbouring pixels."""
    return float(clip.diff(dim=1).abs().mean() + clip.diff(dim=2).abs().mean())


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
    first, first_of, lines = measured[0], contenders[0], []
    for one, m in zip(contenders, measured):
        line = (f"{m.name}: {one.steps} steps, cfg {one.cfg:g}; {m.parameters / 1e6:,.2f} M parameters, {m.bytes / 2**20:,.1f} MiB; "
                f"{m.seconds:.3f} s a clip (warm, median of {clips})")
        if m is not first:
            psnr = "equal to the teacher's" if math.isinf(m.psnr) else f"{m.psnr:.1f} dB from the teacher's"
            line += f", {first.seconds / m.seconds:.2f} times as fast; clips {psnr} (PSNR), "
            line += f"sharpness {m.sharpness:.2f}" + ("" if math.isnan(m.motion) else f" and motion {m.motion:.2f}") + " times the teacher's"
        lines.append(f"{line}.")
    if first.kept:
        lines.append(f"{first.kept} of the teacher's clips and their seconds are of an earlier comparison.")
    if first_of.role and first_of.other:
        lines.append(f"Of each clip these make the part of {first_of.role.side} noise, and one and the same other expert the rest, along {first_of.other.steps} "
                     f"steps at cfg {first_of.other.cfg:g}: seconds are of both.")
    return "\n".join((*lines, *first_of.remark, f"{clips} clips of latent size {' x '.join(map(str, shape))}, the same noise for all."))
