"""What blocks and neurons are judged on: states of the teacher's own sampling, and how far from its velocity there another one is."""
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import flow
from ..cond import Cond, joined
from ..config import PATCH
from ..errors import WanLiteError
from ..prompts import PromptBank
from ..roles import Role
from ..teacher import Teacher, guided_velocity
from .plan import Progress

ROLLOUT_STEPS = 8           # Euler steps of a probing rollout
TOKENS_AT_ONCE = 4096       # small videos share a forward, large ones do not


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probe:
    """States of the teacher's sampling: x [B, C, T, H, W] in processed space, sigma [B], and what they are conditioned on, fp32 on the CPU."""
    x: Tensor
    sigma: Tensor
    cond: Cond

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Probe:
        return Probe(x=self.x[part], sigma=self.sigma[part], cond=self.cond[part])

    @property
    def batch(self) -> int:
        """States that share a forward."""
        return max(1, TOKENS_AT_ONCE // tokens(self.x.shape[1:]))


def tokens(shape: Collection[int]) -> int:
    """Tokens of one sample of shape (C, T, H, W)."""
    _, frames, rows, columns = shape
    return max(1, math.prod(size // patch for size, patch in zip((frames, rows, columns), PATCH)))


def make_probe(teacher: Teacher, prompts: PromptBank, shape: tuple[int, int, int, int], *, seed: int, count: int, cfg: float,
               each: int = 2, renoised: int = 0, role: Role | None = None) -> Generator[Progress, None, Probe]:
    """`count` states of shape (C, T, H, W) from short guided rollouts at the deployment shift, one prompt each.

    Of 8 steps a rollout gives `each` (1, 2, 4 or 8) states, evenly apart and one step later in every next rollout, so that any 8 states
    in a row see every sigma. renoised: beside them, how often its end is noised again, half of the times to a sigma anywhere: a shifted path
    has no low ones. role: of one of two experts, whose side alone the states are of; the teacher is then both. Yields once a forward; raises
    WanLiteError on a shape that the teacher does not take.
    """
    check_shape(teacher, shape)
    together = max(1, TOKENS_AT_ONCE // (2 * tokens(shape)))
    sigmas = flow.schedule(ROLLOUT_STEPS, teacher.shift)
    wanted = range(ROLLOUT_STEPS) if role is None else role.turns(sigmas)
    if not wanted:
        raise WanLiteError(f"At shift {teacher.shift:g} no step of the teacher lies on the {role.side} side of {role.boundary:g}.", "",
                           "Set ModelSamplingSD3's shift to the one that you sample with.")
    steps = ROLLOUT_STEPS if renoised else wanted[-1] + 1           # nobody asks for what follows
    rollouts = list(range(math.ceil(count / (max(1, each * len(wanted) // ROLLOUT_STEPS) + renoised))))
    apart = max(1, len(wanted) // max(1, each * len(wanted) // ROLLOUT_STEPS))
    held = prompts.held_out             # what a student is measured on takes no part in making it
    order = [i for i in torch.randperm(len(prompts), generator=_generator(seed, -1)).tolist() if i not in held]
    states: list[Probe] = []
    for first in range(0, len(rollouts), together):
        group = rollouts[first:first + together]
        which = [order[r % len(order)] for r in group]
        positive, negative = prompts.cond(which), prompts.negative_cond(which)
        noise = positive.placed(torch.stack([torch.randn(shape, generator=_generator(seed, r)) for r in group]))           # [b, C, T, H, W]
        path = flow.euler_steps(lambda x, sigma: guided_velocity(teacher, x, sigma, positive, negative, cfg), noise, sigmas[:steps + 1])
        taken: dict[tuple[int, int], Probe] = {}
        for step in range(steps):
            with torch.no_grad():
                x, sigma, _ = next(path)
            with torch.inference_mode(False), torch.no_grad():
                for i, r in enumerate(group):
                    if step in wanted and wanted.index(step) % apart == r % apart:
                        taken[r, step] = Probe(x=x[i:i + 1].clone(), sigma=sigma[i:i + 1].clone(), cond=positive[i:i + 1].clone())
            yield Progress(stage="Probing the teacher", done=first + len(group) * (step + 1) // steps, total=len(rollouts))
        with torch.no_grad():
            x0, *_ = next(path)
        with torch.inference_mode(False), torch.no_grad():
            for i, r in enumerate(group):
                taken |= {(r, ROLLOUT_STEPS + k): state for k, state in enumerate(
                    _noised_again(x0[i:i + 1].clone(), positive[i:i + 1], teacher.shift, renoised, _generator(seed + 1, r), role))}
        states.extend(taken[key] for key in sorted(taken))
    with torch.inference_mode(False), torch.no_grad():
        return Probe(x=torch.cat([s.x for s in states]), sigma=torch.cat([s.sigma for s in states]),
                     cond=joined([s.cond for s in states]))[:count]


def _noised_again(x0: Tensor, cond: Cond, shift: float, count: int, draw: torch.Generator, role: Role | None) -> Iterator[Probe]:
    sigmas = flow.sample_sigma(count, shift, 0.5, draw)
    while role is not None and not role.owns(sigmas).all():
        sigmas = torch.where(role.owns(sigmas), sigmas, flow.sample_sigma(count, shift, 0.5, draw))
    for sigma in (sigmas[i:i + 1] for i in range(count)):       # split(1) makes one empty sigma out of none
        yield Probe(x=flow.add_noise(x0, torch.randn(x0.shape, generator=draw).to(x0), sigma), sigma=sigma, cond=cond.clone())


def check_shape(teacher: Teacher, shape: tuple[int, int, int, int]) -> None:
    """Raises WanLiteError unless the teacher samples latents of shape (C, T, H, W)."""
    channels = teacher.config.out_dim
    if shape[0] != channels or min(shape) < 1 or shape[2] % 2 or shape[3] % 2:
        raise WanLiteError(f"The latents have shape {list(shape)}.", f"This teacher takes [{channels}, T, H, W] with even H and W.",
                           "Use an empty latent of the video size that you generate.")


Velocity = Callable[[Tensor, Tensor, Cond], Tensor]


def answers(velocity: Velocity, probe: Probe) -> Iterator[Tensor]:
    """The velocities [b, C, T, H, W] at the probe's states, one forward per item.

    The model runs in the caller's mode, since a ComfyUI MODEL must not leave inference mode; what comes out is a normal tensor.
    """
    for start in range(0, len(probe), probe.batch):
        part = probe[start:start + probe.batch]
        with torch.no_grad():
            v = velocity(part.x, part.sigma, part.cond)
        with torch.inference_mode(False), torch.no_grad():
            v = v.float().clone()
        yield v


def velocity_errors(velocity: Velocity, probe: Probe, target: Tensor) -> Iterator[Tensor]:
    """|v - target| / |target| of each state, [b] per forward; target [B, C, T, H, W]. Raises WanLiteError when it is not finite."""
    start = 0
    for v in answers(velocity, probe):
        with torch.inference_mode(False), torch.no_grad():
            wanted = target[start:start + len(v)]
            error = (v - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1).clamp_min(1e-12)
        if not torch.isfinite(error).all():
            raise WanLiteError("The model answered with numbers that are not finite.", "", "Load the teacher in bf16 or fp32.")
        start += len(v)
        yield error


def without(teacher: Teacher, skip: Collection[int]) -> Velocity:
    """The teacher's velocity with these blocks taken as the identity."""
    return lambda x, sigma, cond: teacher.velocity(x, sigma, cond, skip=skip)


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
