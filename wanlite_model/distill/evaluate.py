"""How far a student is from its teacher, on states that were never trained on."""
from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import flow
from ..compress.importance import TOKENS_AT_ONCE, tokens
from ..cond import Cond
from ..prompts import PromptBank
from ..transformer import WanLiteStudent
from .data import Batch
from .job import DistillJob
from .paths import own_sigmas

BUCKETS = 4                     # of sigma: [0, .25), [.25, .5), [.5, .75), [.75, 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Held-out error of one set of weights.

    error: sum |v_s - v_w|^2 / sum |v_w|^2 over all states; for trajectory KD, of where the student's own steps end from the teacher's
    noise: sum |x0_s - x0|^2 / sum |x0|^2 (of one of two experts, from where its side begins to where it ends); for distribution matching, the
    drift of those ends. buckets: the former per quarter of sigma (nan without a state there); closure: 1 - sum |v_s - v_w|^2 / sum |v_pos -
    v_w|^2, how much of the teacher's guidance is in the student (nan without guidance).
    """
    error: float
    buckets: tuple[float, ...]
    closure: float
    states: int

    @classmethod
    def from_json(cls, noted: Mapping[str, Any]) -> Held:
        """From what `asdict` made of one, by way of JSON."""
        return cls(**{**noted, "buckets": tuple(noted["buckets"])})


def student_velocity(student: WanLiteStudent, x: Tensor, sigma: Tensor, cond: Cond, features: Collection[int] | None = None):
    """The student's velocity [B, C, T, H, W] in float32, in bf16 autocast on a GPU, as it will be run.

    features: blocks whose outputs are wanted too; then (velocity, {block: [B, N, D]}) is returned.
    """
    device = next(student.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        options = {} if features is None else {"return_features": features}
        return cond.to(device).asked(student, x.to(device), sigma.to(device), **options)


def guided_student_velocity(student: WanLiteStudent, x: Tensor, sigma: Tensor, prompts: PromptBank, which: tuple[int, ...],
                            job: DistillJob) -> Tensor:
    """The student's velocity as it will be sampled: at cfg 1, or with its own guidance where guidance was kept."""
    v_pos = student_velocity(student, x, sigma, prompts.cond(which))
    if job.student_cfg == 1:
        return v_pos
    return flow.guided(student_velocity(student, x, sigma, prompts.negative_cond(which)), v_pos, job.student_cfg)


def at_once(job: DistillJob) -> int:
    """States that share a forward."""
    return max(1, TOKENS_AT_ONCE // tokens(job.shape) // 2)


def evaluate(student: WanLiteStudent, held: Batch, prompts: PromptBank, job: DistillJob, paths: Batch | None = None
             ) -> Generator[tuple[int, int], None, Held]:
    """Yields (states done, states in all) after each forward; returns Held. The student is left in the mode it was in.

    held: states and what the teacher answers there. paths: noises and the ends of the teacher's paths from them, for trajectory KD.
    """
    size = at_once(job)
    sigmas = own_sigmas(job)
    steps = len(sigmas) - 1
    total = len(held.x) + (0 if paths is None else len(paths.x) * steps)
    errors, scales, gaps = [], [], []
    for start in range(0, len(held.x), size):
        with torch.inference_mode(False), torch.no_grad():
            part = held[start:start + size]
            target = part.guided(job.cfg)
            v = guided_student_velocity(student, part.x, part.sigma, prompts, part.prompts, job).cpu()
            errors.append((v - target).square().flatten(1).double().mean(1))
            scales.append(target.square().flatten(1).double().mean(1))
            gaps.append((part.v_pos - target).square().flatten(1).double().mean(1))
        yield min(start + size, len(held.x)), total
    found = _summary(torch.cat(errors), torch.cat(scales), torch.cat(gaps), held.sigma)
    if paths is None:
        return found
    ends = []
    for start in range(0, len(paths.x), size):
        part = paths[start:start + size]
        end = part.x
        for i, x in enumerate(roll(student, part.x, sigmas, prompts, part.prompts, job)):
            end = x
            yield len(held.x) + start * steps + (i + 1) * len(part.x), total
        ends.append(end)
    told = prompts.cond(paths.prompts[:1])              # as many frames are given with each
    end, goal = told.made(torch.cat(ends)), told.made(paths.goal)
    error = drift(end, goal) if job.matching else float((end - goal).square().double().sum() / goal.square().double().sum())
    return replace(found, error=error, closure=float("nan"))


def drift(clips: Tensor, others: Tensor) -> float:
    """How far brightness, contrast, sharpness and motion of clips are from others' from the same noise, both latents [B, C, T, H, W].

    The mean square, over clips and channels, of: the difference of their means in standard deviations of the other, and the logarithm of
    the ratio of their standard deviations and of the mean differences between neighbours along each axis. 0 is none, wherever things are.
    """
    ours, its = (_traits(latents.double()) for latents in (clips, others))
    shifted = (ours[0] - its[0]) / its[1]
    ratios = [(a / b).log() for a, b in zip(ours[1:], its[1:])]
    return float(torch.stack([shifted, *ratios]).square().mean())


def _traits(latents: Tensor) -> list[Tensor]:
    """Mean, standard deviation and mean absolute difference of neighbours along T (of more than one frame), H and W: [B, C] each."""
    steps = [latents.diff(dim=axis).abs() for axis in (2, 3, 4) if latents.shape[axis] > 1]
    return [latents.mean((2, 3, 4)), *(value.clamp_min(1e-6) for value in (latents.std((2, 3, 4)), *(step.mean((2, 3, 4)) for step in steps)))]


def roll(student: WanLiteStudent, noise: Tensor, sigmas: Tensor, prompts: PromptBank, which: tuple[int, ...], job: DistillJob) -> Iterator[Tensor]:
    """The student's own Euler steps from noise [B, C, T, H, W] along sigmas [K + 1], as it will be sampled: x after each, K in all."""
    def velocity_of(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return guided_student_velocity(student, x, sigma, prompts, which, job).cpu()

    for (x, _, v), sigma, following in zip(flow.euler_steps(velocity_of, prompts.cond(which).placed(noise), sigmas), sigmas[:-1], sigmas[1:]):
        yield flow.euler_step(x, v, sigma, following)           # a forward to each


def draw(student: WanLiteStudent, x: Tensor, prompts: PromptBank, prompt: int, job: DistillJob) -> Generator[tuple[int, int], None, Tensor]:
    """A sample from x [1, C, T, H, W], where the student's own steps begin. Yields (steps done, of all); returns latents [1, C, T, H, W].

    Of what one of two experts leaves to the other, the clip that it then sees.
    """
    sigmas = own_sigmas(job)
    for done, x in enumerate(roll(student, x, sigmas, prompts, (prompt,), job), start=1):
        yield done, len(sigmas) - 1
    if sigmas[-1] == 0:
        return x
    with torch.inference_mode(False), torch.no_grad():
        return flow.denoised(x, guided_student_velocity(student, x, sigmas[-1:], prompts, (prompt,), job).cpu(), sigmas[-1:])


def _summary(error: Tensor, scale: Tensor, gap: Tensor, sigma: Tensor) -> Held:
    def ratio(top: Tensor, bottom: Tensor) -> float:
        return float(top.sum() / bottom.sum()) if bottom.sum() > 0 else float("nan")

    bucket = (sigma * BUCKETS).long().clamp(0, BUCKETS - 1)
    per_bucket = tuple(ratio(error[bucket == b], scale[bucket == b]) for b in range(BUCKETS))
    return Held(error=ratio(error, scale), buckets=per_bucket, closure=1 - ratio(error, gap), states=len(error))
