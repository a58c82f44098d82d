"""AdamW, and Muon for the blocks' matrices, on fp32 master weights; the learning rate, and the average of the weights that is evaluated and kept."""
from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .eightbit import AdamW8, packed, unpacked
from .job import Recipe

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)       # of x, x^3 and x^5
STACKED = 1 << 24                               # numbers of equal matrices that are made orthogonal together


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether it is one of the blocks' matrices, which is where a WAN's size is."""
    return name.startswith("blocks.") and parameter.ndim == 2


def make_optimizer(trained: Mapping[str, nn.Parameter], recipe: Recipe, in_8bit: bool = False, seed: int = 0) -> torch.optim.Optimizer:
    """Where the weights are fp32 they are the master weights; half precision then exists only inside autocast. Adapters always take AdamW.

    in_8bit: AdamW with moments of 8 bits, in place of Muon too; seed: of its rounding.
    """
    matrices = [value for name, value in trained.items() if is_matrix(name, value)]
    if in_8bit:
        return AdamW8(trained.values(), recipe.learning_rate, recipe.weight_decay, seed)
    settings = {"lr": recipe.learning_rate, "betas": (0.9, 0.99), "weight_decay": recipe.weight_decay, "foreach": True}
    if recipe.optimizer == "AdamW" or recipe.rank:
        return torch.optim.AdamW(trained.values(), **settings)
    return Muon(matrices, trained.values(), **settings)


def adapted(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """What another optimizer kept of a parameter, as this one keeps it: a run can go on with less memory, or with more. Muon's, which lacks a half,
    begins anew.
    """
    if isinstance(optimizer, AdamW8):
        return packed(moments) if {"exp_avg", "exp_avg_sq"} <= moments.keys() else moments if "first" in moments else {}
    moments = unpacked(moments) if "first" in moments else moments
    if isinstance(optimizer, Muon) and parameter in optimizer.matrices:
        return {key: value for key, value in moments.items() if key != "exp_avg_sq"}
    return moments


class Muon(torch.optim.AdamW):
    """AdamW for all but some matrices; those take a step of Muon (Jordan et al. 2024): momentum, made about orthogonal.

    Such a step is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both. A matrix needs
    one moment instead of two.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], trained: Iterable[nn.Parameter], **adamw: Any) -> None:
        super().__init__(trained, **adamw)
        self._in_order, self.matrices = matrices, set(matrices)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        gradients = {matrix: matrix.grad for matrix in self._in_order if matrix.grad is not None}
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


class Released:
    """Weights that move as soon as their gradient is there, in the middle of backward, after which it is freed: never are all of them in memory.

    The norm of all is not known then: each tensor's own is held at `most`. A batch that goes through in parts moves them with each part.
    """

    def __init__(self, trained: Iterable[nn.Parameter], optimizer: AdamW8, most: float) -> None:
        self.optimizer, self.most, self.norms = optimizer, most, []
        mine = weakref.ref(self)            # a parameter that holds its optimizer would hold itself: Python does not see through its hooks
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda parameter: mine()._move(parameter))

    @property
    def moved(self) -> bool:
        """Whether some weights have moved since `norm` was asked for."""
        return bool(self.norms)

    @torch.no_grad()
    def _move(self, parameter: Tensor) -> None:
        norm = parameter.grad.norm()
        self.norms.append(norm)
        parameter.grad.mul_((self.most / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step_parameter(parameter)
        parameter.grad = None

    def norm(self) -> Tensor:
        """That of all gradients of the step that is over."""
        norms, self.norms = self.norms, []
        return torch.stack(norms).norm()


def lr_at(step: int, total: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak (SGDR, Loshchilov & Hutter 2017, without restarts)."""
    warmup = min(recipe.warmup, total // 5)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return recipe.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class WeightAverage:
    """Exponential moving average of what is trained, in fp32; it follows quickly at first, so that a short job is not held back."""

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float, device: torch.device | None = None) -> None:
        """device: where it lies; None is where the weights are."""
        self.trained, self.decay = trained, decay
        self.values = {name: parameter.detach().to(device or parameter.device, torch.float32, copy=True) for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        if self._apart:
            for name, parameter in self.trained.items():        # one at a time is on its way
                self.values[name].lerp_(parameter.detach().to(self.values[name]), 1 - decay)
        else:
            torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.trained.values()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network computes with the average. No copy where they lie together: the two exchange their storage."""
        apart = self._apart
        kept = self._put_in() if apart else self._exchange()
        try:
            yield
        finally:
            self._put_back(kept) if apart else self._exchange()

    @property
    def _apart(self) -> bool:
        return any(value.device != self.trained[name].device or value.dtype != self.trained[name].dtype for name, value in self.values.items())

    def _exchange(self) -> None:
        with torch.inference_mode(False):
            for name, parameter in self.trained.items():
                self.values[name], parameter.data = parameter.data, self.values[name]

    def _put_in(self) -> dict[str, Tensor]:
        """The weights as they were, beside the average: rounded into it, it would no longer follow."""
        with torch.inference_mode(False), torch.no_grad():
            kept = {name: self.trained[name].detach().to(value.device, copy=True) for name, value in self.values.items()}
            for name, value in self.values.items():
                self.trained[name].data.copy_(value)
        return kept

    def _put_back(self, kept: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, value in kept.items():
                self.trained[name].data.copy_(value)
