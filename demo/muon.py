"""Muon (Jordan et al. 2024) over several CPU cores, a stack of equal matrices at a time."""

from collections import defaultdict

import torch
from torch import Tensor

from wanlite_model.distill.optim import orthogonal

from .workers import COUNT, Workers


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest orthogonal matrix, scaled to the size of an AdamW step (Liu et al. 2025)."""

    def __init__(self, matrices: list[torch.nn.Parameter], workers: Workers, lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.01) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._workers = workers

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                by_shape[tuple(matrix.shape)].append(matrix)
            for (rows, columns), matrices in by_shape.items():
                directions = [self._momentum(matrix, group["momentum"]) for matrix in matrices]
                updates = self._workers.map(orthogonal, torch.stack(directions).chunk(COUNT))
                size = 0.2 * max(rows, columns) ** 0.5
                for matrix, update in zip(matrices, torch.cat(updates), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * size)

    def _momentum(self, matrix: torch.nn.Parameter, momentum: float) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["momentum"], momentum)        # Nesterov
