"""What the removed blocks added, folded without training into the block after the gap.

Of all that a WAN block adds to its tokens only the cross attention is not gated by the noise level: x <- x + W a + b, with a what its last
layer cross_attn.o is given. With y what the whole teacher has right there and x what the start has, the refit minimises
E|y - x - (W + D) a - b'|^2 + ridge |D|^2: from the joint moments of a and of e = y - x - W a - b, what is still missing, D = C_ea (C_aa +
ridge I)^-1 and b' = b + m_e - D m_a. The mean alone, D = 0, is what the gap added always alike. The ridge pulls towards the teacher's own
weight, never towards zero. A start that misses nothing keeps W and b.
"""
from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ..teacher import Teacher, tapped
from .ffn import RIDGE, Moments
from .importance import Probe
from .plan import CompressionPlan, Progress, Refit
from .walk import Keep, Read, Walk

STAGE = "Refitting after the gaps"
LAYER = "cross_attn.o"


def refit_gaps(teacher: Teacher, read: Read, plan: CompressionPlan, probe: Probe, refit: Refit, keep: Keep) -> Generator[Progress, None, None]:
    """Refits, in their order, the start's blocks that follow a gap, each with those before it refitted already.

    read: the start's tensors, and those that keep took. keep: takes a block's weight and bias once they are refitted.
    Yields after each forward of the teacher and each block.
    """
    if not plan.after_gaps:
        return
    total, targets = plan.after_gaps[-1] + 1, {}
    walk = Walk(read, plan, teacher, probe)
    for j in range(total):
        walk.enter(j)
        if j in plan.after_gaps:
            if _meeting(plan, j) not in targets:
                group = [_meeting(plan, i) for i in plan.after_gaps if i >= j][:walk.together]
                targets = yield from walk.recorded(group, Progress(stage=STAGE, done=j, total=total), given=True)
            mean, covariance = _moments(walk, targets.pop(_meeting(plan, j))).finish()
            names = f"blocks.{j}.{LAYER}.weight", f"blocks.{j}.{LAYER}.bias"
            keep(dict(zip(names, refitted(*map(read, names), mean=mean, covariance=covariance, ridge=None if refit == "mean" else RIDGE))))
            walk.enter(j)
        if j + 1 < total:
            walk.advance()
        yield Progress(stage=STAGE, done=j + 1, total=total)


def _meeting(plan: CompressionPlan, j: int) -> str:
    """The teacher's module that is given its tokens where the start's, after its cross attention in block j, are to meet them."""
    return f"blocks.{plan.keep[j]}.norm2"


def _moments(walk: Walk, target: Tensor) -> Moments:
    """Of a and e side by side [2 D], over the tokens of all states; target [S, N, D]."""
    moments, seen = Moments(), {}
    taps = {LAYER: lambda given, _: seen.update(a=given), "norm2": lambda given, _: seen.update(x=given)}
    for which in walk.parts():
        with torch.inference_mode(False), torch.no_grad():
            with tapped(walk.block, taps):
                walk.answer(which)
            missing = target[which].to(seen["x"].device, torch.float32) - seen["x"].float()       # [b, N, D]
            moments(torch.cat((seen["a"].float(), missing), dim=-1), missing)
    return moments


def refitted(weight: Tensor, bias: Tensor, *, mean: Tensor, covariance: Tensor, ridge: float | None) -> tuple[Tensor, Tensor]:
    """The layer's weight [D, D] and bias [D] in their dtypes, from the mean [2 D] and covariance [2 D, 2 D] of a and e side by side.

    ridge: of a's mean variance; None leaves the weight alone.
    """
    with torch.inference_mode(False), torch.no_grad():
        width = len(bias)
        shift = mean[width:]                                                         # [D]
        if ridge is None:
            return weight, (bias.double() + shift).to(bias.dtype)
        within, across = covariance[:width, :width].clone(), covariance[width:, :width]             # [D, D]: C_aa, C_ea
        within.diagonal().add_((ridge * within.diagonal().mean()).clamp_min(1e-30))
        correction = torch.cholesky_solve(across.T, torch.linalg.cholesky(within)).T
        return (weight.double() + correction).to(weight.dtype).contiguous(), (bias.double() + shift - correction @ mean[:width]).to(bias.dtype)
