"""AdamW on fp32 master weights, its learning rate, and the average of the weights that is evaluated and kept."""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .job import Recipe


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """The module's weights are fp32 and are the master weights; half precision exists only inside autocast."""
    return torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay,
                             foreach=True)


def lr_at(step: int, total: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak (SGDR, Loshchilov & Hutter 2017, without restarts)."""
    warmup = min(recipe.warmup, total // 5)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return recipe.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class WeightAverage:
    """Exponential moving average of a module's weights; it follows quickly at first, so that a short job is not held back."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        self.values = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in module.parameters()], 1 - decay)

    @contextmanager
    def in_place_of(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module computes with the average. No copy: the two exchange their storage."""
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module)

    def _exchange(self, module: nn.Module) -> None:
        with torch.inference_mode(False):
            for i, parameter in enumerate(module.parameters()):
                self.values[i], parameter.data = parameter.data, self.values[i]
