"""What the student is asked to match."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..compress.blockwise import OUTLIER


def velocity_loss(velocity: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Mean squared error per sample [B] of two [B, C, T, H, W], in units of `scale`: the targets' mean square over the whole batch."""
    return (velocity - target).square().flatten(1).mean(1) / scale.clamp_min(1e-12)


def feature_loss(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Mean over block pairs (student, teacher) of the squared error of [B, N, D], normalised by the teacher's, outliers left out."""
    losses = []
    for mine, its in pairs:
        target = teacher[its].float()
        spread = target.std()
        keep = (target - target.mean()).abs() <= OUTLIER * spread
        error = (student[mine].float() - target).square()
        losses.append((error * keep).sum() / (target.square() * keep).sum().clamp_min(1e-12))
    return torch.stack(losses).mean()


def feature_pairs(keep: Sequence[int], teacher_layers: int, most: int = 4) -> list[tuple[int, int]]:
    """Which student block is to hand on what which teacher block hands on.

    A student block that stands before a gap answers for the removed blocks as well: it is matched to the last teacher block before the
    next kept one. Without gaps, evenly spread blocks are matched; `most` pairs in all.
    """
    following = [*keep[1:], teacher_layers]
    pairs = [(j, after - 1) for j, after in enumerate(following)]
    gaps = [pair for pair, block in zip(pairs, keep) if pair[1] != block]
    chosen = gaps or pairs
    stride = max(1, -(-len(chosen) // most))
    return chosen[::-1][::stride][::-1]
