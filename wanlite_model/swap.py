"""Blocks of a frozen WAN whose matrices lie in CPU memory: they are copied to the device before the block runs and dropped after it.

Names, shapes and numbers stay what they are, and a state dict holds the matrices in CPU memory, which are the only lasting ones. Backward
needs them again: with gradient checkpointing it runs the block again, which brings them; without, autograd keeps every copy and nothing is saved.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .pinned import host_memory
from .transformer import WanLiteStudent

Weights = Mapping[nn.Linear, nn.Parameter | None]         # the matrices of a block, by layer


def lay_out(module: WanLiteStudent, device: torch.device, swapped: int = 0) -> None:
    """Gives a module whose tensors lie nowhere yet (on the meta device) memory on `device`, unfilled; it must not be moved or cast afterwards.

    swapped: so many of its blocks, evenly apart, get it for their matrices in CPU memory and have these visit the device. They must be frozen.
    """
    blocks = [module.blocks[i * len(module.blocks) // swapped] for i in range(swapped)]
    layers = [[layer for layer in block.modules() if isinstance(layer, nn.Linear)] for block in blocks]
    memory = iter(host_memory([layer.weight for of_block in layers for layer in of_block], device))
    swap = Swap([{layer: _frozen(next(memory)) for layer in of_block} for of_block in layers], device)
    for of_block in layers:
        _put(dict.fromkeys(of_block))
    for part in module.modules():
        for name, value in tuple(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(value, device=device), requires_grad=value.requires_grad))
    for place, block in enumerate(blocks):
        swap.drop(place)
        block.register_forward_pre_hook(lambda *_, place=place: swap.bring(place))
        block.register_forward_hook(lambda *_, place=place: swap.drop(place), always_call=True)     # a recomputation ends by an exception


class Swap:
    """The traffic between homes and device: at most the matrices of one block at work, and those of the next on their way."""

    def __init__(self, homes: Sequence[Weights], device: torch.device) -> None:
        """homes: of each swapped block, in their order."""
        self.homes, self.device = homes, device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.coming: dict[int, Weights] = {}
        self.last = -1

    def bring(self, place: int) -> None:
        """Puts copies into the layers of a block, and sends for those of the block that is likely to follow: a walk goes on as it went."""
        weights = self.coming.pop(place, None) or self._sent(place)
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        self.coming.clear()                 # it was something else that followed
        _put(weights)
        following, self.last = place + (1 if place > self.last else -1), place
        if 0 <= following < len(self.homes):
            self.coming[following] = self._sent(following)

    def drop(self, place: int) -> None:
        """Puts the block's own matrices back. Copies that autograd saved live on until it is done with them."""
        _put(self.homes[place])

    def _sent(self, place: int) -> Weights:
        """Copies that arrive on the side stream.

        Their memory is the computing stream's: the side stream waits for what was done there before, and the computing stream for the copies
        before it uses or frees them. So memory is reused at once, as within one stream, and there are never more than two blocks of copies.
        """
        weights = {layer: _frozen(torch.empty(home.shape, dtype=home.dtype, device=self.device)) for layer, home in self.homes[place].items()}
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.side is None else torch.cuda.stream(self.side), torch.no_grad():
            for layer, weight in weights.items():
                weight.copy_(self.homes[place][layer], non_blocking=True)
        return weights


def _put(weights: Weights) -> None:
    for layer, weight in weights.items():
        layer.weight = weight


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
