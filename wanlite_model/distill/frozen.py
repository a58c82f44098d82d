"""The matrices of a frozen WAN's blocks in float8: half the memory of bf16, for about 3 % of error in each.

Modules, names and shapes stay WAN's. A matrix is made whole again only while its layer runs, forward and once more backward.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformer import WanLiteStudent

FLOAT8 = torch.float8_e4m3fn    # 4 bits of exponent, 3 of mantissa: within 1/16 of a number, down to 1/28672 of its row's largest


class Float8Linear(nn.Linear):
    """A frozen linear layer. weight [out, in] in float8 times scale [out, 1] in fp32 is its matrix; bias has the dtype that it computes in."""

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        """In the place of a layer whose matrix lies nowhere yet (on the meta device), as this one's does. device: that the arithmetic is done on."""
        super().__init__(layer.in_features, layer.out_features, device="meta", dtype=FLOAT8)
        self.weight.requires_grad_(False)
        self.bias = layer.bias
        self.register_buffer("scale", torch.empty(layer.out_features, 1, device=device), persistent=False)         # a WAN's state dict has no such name

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.scale, self.bias)

    @torch.no_grad()
    def copy_(self, value: Tensor) -> None:
        """Takes another matrix [out, in], rounded as it would be had it been loaded with the module."""
        weight, scale = quantised(value.to(self.scale.device, self.bias.dtype))
        self.weight.copy_(weight)
        self.scale.copy_(scale)


class _Product(torch.autograd.Function):
    """F.linear for a frozen weight. Autograd would keep the whole matrix of every layer for the gradient of x; this makes it twice instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantised(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ dequantised(*ctx.saved_tensors, gradient.dtype), None, None, None


def hold_in_float8(module: WanLiteStudent, device: torch.device) -> None:
    """Makes the linear layers of a frozen module's blocks Float8Linear, before there is memory for their matrices."""
    for block in module.blocks:
        for parent in tuple(block.modules()):
            for name, layer in tuple(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, Float8Linear(layer, device))


def places(module: nn.Module) -> dict[str, Tensor | Float8Linear]:
    """The module's state dict for writing: `places(module)[name].copy_(value)` is right for a matrix in float8 too, which is quantised anew."""
    return {**module.state_dict(), **{f"{path}.weight": layer for path, layer in module.named_modules() if isinstance(layer, Float8Linear)}}


def quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> float8 [out, in] and scale [out, 1] in fp32, which takes the largest number of each row to float8's largest."""
    matrix = matrix.float()
    scale = matrix.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / torch.finfo(FLOAT8).max
    return (matrix / scale).to(FLOAT8), scale


def dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in]; a float8 number is exact in any other dtype, so that this rounds once."""
    return weight.to(dtype).mul_(scale)
