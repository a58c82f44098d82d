"""CPU memory that a GPU copies from and to while both go on working.

torch takes it in powers of two. Here it is asked for as such, so that a count of bytes sees what is really taken.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ALIGNED = 512           # bytes that a tensor begins at a multiple of, as torch's own do


def host_memory(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Unfilled contiguous tensors of these shapes and dtypes in CPU memory, pinned where `device`, which copies from and to them, is a GPU.

    Pinned ones share pieces of memory, each about full, which are freed as a whole.
    """
    if device.type != "cuda":
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in tensors]
    sizes = [-(-max(1, tensor.numel() * tensor.element_size()) // ALIGNED) * ALIGNED for tensor in tensors]
    made: list[Tensor] = []
    for count, size in pieces(sizes):
        memory, start = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True), 0
        for tensor, taken in zip(tensors[len(made):len(made) + count], sizes[len(made):]):
            made.append(memory[start:start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape))
            start += taken
    return made


def pieces(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(how many, bytes): powers of two, for the next so many each. As large as can be filled, so that only each one's end is lost."""
    while sizes:
        size = max(_power_of_two(sizes[0]), _power_of_two(sum(sizes) // 2 + 1))
        count, left = 0, size
        while count < len(sizes) and sizes[count] <= left:
            count, left = count + 1, left - sizes[count]
        yield count, size
        sizes = sizes[count:]


def _power_of_two(size: int) -> int:
    """The smallest that is not below."""
    return 1 << (size - 1).bit_length()
