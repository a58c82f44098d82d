"""AdamW, and Muon for the blocks' matrices, on fp32 master weights; the learning rate, and the average of the weights that is evaluated and kept."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .job import Recipe

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)       # of x, x^3 and x^5
STACKED = 1 << 24                               # numbers of equal matrices that are made orthogonal together


def make_optimizer(trained: Mapping[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """The weights are fp32 and are the master weights; half precision exists only inside autocast. Adapters always take AdamW."""
    matrices = [value for name, value in trained.items() if name.startswith("blocks.") and value.ndim == 2]
    settings = {"lr": recipe.learning_rate, "betas": (0.9, 0.99), "weight_decay": recipe.weight_decay, "foreach": True}
    if recipe.optimizer == "AdamW" or recipe.rank:
        return torch.optim.AdamW(trained.values(), **settings)
    return Muon(matrices, trained.values(), **settings)


class Muon(torch.optim.AdamW):
    """AdamW for all but some matrices; those take a step of Muon (Jordan et al. 2024): momentum, made about orthogonal.

    Such a step is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both. A matrix needs
    one moment instead of two.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], trained: Iterable[nn.Parameter], **adamw: Any) -> None:
        super().__init__(trained, **adamw)
        self._matrices = matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        gradients = {matrix: matrix.grad for matrix in self._matrices if matrix.grad is not None}
        for matrix in gradients:
            matrix.grad = None          # AdamW passes over what has none
        super().step(closure)
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in gradients:
            by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        for (rows, columns), alike in by_shape.items():
            together = max(1, STACKED // (rows * columns))
            for start in range(0, len(alike), together):
                self._orthogonal_step(alike[start:start + together], gradients)

    def _orthogonal_step(self, matrices: Sequence[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """A step of matrices of one shape."""
        group = self.param_groups[0]
        updates = orthogonal(torch.stack([self._momentum(matrix, gradients[matrix]) for matrix in matrices]))
        size = 0.2 * max(updates.shape[1:]) ** 0.5
        for matrix, update in zip(matrices, updates):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)

    def _momentum(self, matrix: nn.Parameter, gradient: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state.update(exp_avg=torch.zeros_like(matrix), step=torch.zeros(()))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["exp_avg"], MOMENTUM)             # Nesterov


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, R, C] -> about the same with all singular values near 1, by five rounds of Newton-Schulz; in bf16 on a GPU."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


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
