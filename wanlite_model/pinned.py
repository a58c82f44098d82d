"""CPU memory that a GPU copies from and to while both go on working.

torch takes it in powers of two, and keeps what is freed for the next who asks. Here it is asked for as such, so that a count of bytes sees what is
really taken, and is given back.
"""
from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

LARGEST = 2**30         # bytes of a piece, unless a tensor is larger
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
        memory, start = _pinned(size), 0
        for tensor, taken in zip(tensors[len(made):len(made) + count], sizes[len(made):]):
            made.append(memory[start:start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape))
            start += taken
    return made


def pieces(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(how many, bytes): powers of two, for the next so many each. As large as can be filled and not beyond LARGEST: only each one's end is lost."""
    while sizes:
        size = max(_power_of_two(sizes[0]), min(LARGEST, _power_of_two(sum(sizes) // 2 + 1)))
        count, left = 0, size
        while count < len(sizes) and sizes[count] <= left:
            count, left = count + 1, left - sizes[count]
        yield count, size
        sizes = sizes[count:]


def give_back(device: torch.device) -> None:
    """Returns to the system what nobody holds any more of the memory that torch took on a GPU and pinned for it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)              # a pinned piece is free once the copies from it are done
        if hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()


def _pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:           # systems allow a part of the memory only
        log.warning("No more memory could be pinned (%s). Copies from the rest of it make the GPU wait.", error)
        return torch.empty(size, dtype=torch.uint8, device="cpu")


def _power_of_two(size: int) -> int:
    """The smallest that is not below."""
    return 1 << (size - 1).bit_length()
