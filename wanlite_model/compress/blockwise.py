"""Block-wise distillation: each block that stands before a gap learns to hand on what the removed ones would have, by itself.

One block's weights, gradients and activations are on the device at a time (see walk.py), which is how a model gets slim that could not be
trained there as a whole.
"""
from __future__ import annotations

import math
from collections.abc import Generator

import torch
from torch import Tensor

from ..teacher import Teacher
from .importance import Probe, tokens
from .plan import CompressionPlan, Progress
from .walk import Keep, Read, Walk

STAGE = "Healing block by block"
OUTLIER = 6.0                   # standard deviations; WAN's few massive activations would otherwise be the whole loss
TOKENS_A_STEP = 1024            # more is a better start for more time, which healing the whole makes better use of
LEARNING_RATE = 0.25            # of AdamW at width 1; a layer twice as wide moves twice as far by the same rate


def heal_blocks(teacher: Teacher, read: Read, plan: CompressionPlan, probe: Probe, steps: int, keep: Keep) -> Generator[Progress, None, None]:
    """Trains, in their order, the start's blocks from the first gap on, each for `steps` steps on the probe's states.

    read: the start's tensors. keep: takes a block's tensors once it is trained; then they are forgotten.
    Yields after each forward of the teacher and each step.
    """
    blocks = len(plan.keep)
    ends = [*(block - 1 for block in plan.keep[1:]), plan.teacher_layers - 1]       # the last teacher block that each of ours stands for
    walk = Walk(read, plan, teacher, probe)
    total = blocks * steps
    starts = [0, *plan.keep[1:]]                        # and the first: what is gone before the first kept block falls to that one
    first_gap = next((j for j, (start, end) in enumerate(zip(starts, ends)) if start != end), blocks)
    targets: dict[str, Tensor] = {}
    for j in range(blocks):
        block = walk.enter(j)
        if j >= first_gap:
            if f"blocks.{ends[j]}" not in targets:
                group = [f"blocks.{end}" for end in ends[j:j + walk.together]]
                targets = yield from walk.recorded(group, Progress(stage=STAGE, done=j * steps, total=total))
            yield from _train(walk, probe, targets.pop(f"blocks.{ends[j]}"), steps, j * steps, total)
            with torch.inference_mode(False), torch.no_grad():
                keep({f"blocks.{j}.{name}": value.cpu().to(read(f"blocks.{j}.{name}").dtype, copy=True)
                      for name, value in block.state_dict().items()})
        if j + 1 < blocks:
            walk.advance()
        yield Progress(stage=STAGE, done=(j + 1) * steps, total=total)


def _train(walk: Walk, probe: Probe, target: Tensor, steps: int, done: int, total: int) -> Generator[Progress, None, None]:
    block = walk.block
    mean, spread, scale = _measures(target, walk.hidden)
    with torch.inference_mode(False):
        block.requires_grad_(True)
        peak = LEARNING_RATE / len(block.modulation[0, 0])
        optimizer = torch.optim.AdamW(block.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
    size = max(1, min(len(probe), TOKENS_A_STEP // tokens(probe.x.shape[1:])))
    draw = torch.Generator().manual_seed(done)
    for step in range(steps):
        with torch.inference_mode(False), torch.enable_grad():
            which = torch.randint(len(probe), (size,), generator=draw)
            answered = walk.answer(which)
            wanted = target[which].to(answered.device, torch.float32)
            keep = (wanted - mean).abs() <= OUTLIER * spread
            loss = ((answered - wanted).square() * keep).mean() / scale
            loss.backward()
            torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 10) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield Progress(stage=STAGE, done=done + step, total=total, note=f"loss {float(loss.detach()):.4f}")
    with torch.inference_mode(False):
        block.requires_grad_(False)


def _measures(target: Tensor, hidden: Tensor) -> tuple[float, float, float]:
    """Mean and standard deviation of the target [S, N, D], and the mean square of what the span adds, which is what is to be learned."""
    with torch.inference_mode(False), torch.no_grad():
        sums = torch.zeros(3, dtype=torch.float64)
        for wanted, fed in zip(target, hidden):         # a state at a time: all of them in fp32 would be twice what is kept
            wanted = wanted.float()
            sums += torch.stack([wanted.sum(), wanted.square().sum(), (wanted - fed.float()).square().sum()]).double()
        mean, square, added = (sums / target.numel()).tolist()
    return mean, max(square - mean**2, 0.0) ** 0.5, max(added, 1e-12)
