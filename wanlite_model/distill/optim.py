"""AdamW on fp32 master weights, its learning rate, and the average of the weights that is evaluated and kept."""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .job import Recipe


def make_optimizer(trained: Mapping[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """The weights are fp32 and are the master weights; half precision exists only inside autocast."""
    return torch.optim.AdamW(trained.values(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay,
                             foreach=True)


def lr_at(step: int, total: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak (SGDR, Loshchilov & Hutter 2017, without restarts)."""
    warmup = min(recipe.warmup, total // 5)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return recipe.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class WeightAverage:
    """Exponential moving average of what is trained; it follows quickly at first, so that a short job is not held back."""

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        self.trained, self.decay = trained, decay
        self.values = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.trained.values()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network computes with the average. No copy: the two exchange their storage."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.inference_mode(False):
            for name, parameter in self.trained.items():
                self.values[name], parameter.data = parameter.data, self.values[name]
