"""Bytes that live tensors take, counted while code runs: now, and at the most, on each type of device."""
from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ENTERS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.set_.source_Storage, torch.ops.aten.set_.source_Storage_storage_offset)


class LiveBytes(TorchDispatchMode):
    """Counts the storages of the tensors that operations make inside the `with`, each once and for as long as anything holds it.

    Views and in-place operations add nothing; what autograd saves lives on; what backward makes is counted too, recomputation included. What
    was there before counts only when it is held: see `hold`. Fake and meta tensors count as real ones do, by the bytes that they stand for.

    Not seen: memory that a kernel takes and gives back before it returns, the rounding of an allocator, and a storage's own resize_ (a tensor's
    is). One thing differs from what runs without a counter: where two gradients of one tensor meet, autograd adds out of place as long as any
    dispatch mode is on, so that there are three of them for a moment, not two.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._known: dict[int, _Storage] = {}            # by address, of those that are alive

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else torch imports its compiler for the first operation, which takes a second, and goes through it at each."""
        return False

    def now(self, device_type: str) -> int:
        """Bytes that are alive."""
        return self._now[device_type]

    def peak(self, device_type: str) -> int:
        """The most that were alive at once since the start or the last `reset_peak`, bytes."""
        return self._peak[device_type]

    def reset_peak(self) -> None:
        """Takes what is alive now for the most."""
        self._peak = self._now.copy()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made elsewhere too, from now on."""
        for tensor in tensors:
            self._count(tensor, tensor.device.type)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        answered = func(*args, **(kwargs or {}))
        for tensor in tensors_in(answered):
            self._see(func, tensor, tensor.device.type)
        return answered

    def _see(self, func: Any, tensor: Tensor, device_type: str) -> None:
        """Counts what an operation answered, or corrects what was counted: it may have been resized."""
        if makes_storage(func) or tensor.untyped_storage()._cdata in self._known:
            self._count(tensor, device_type)

    def _count(self, tensor: Tensor, device_type: str) -> None:
        storage = tensor.untyped_storage()
        known, size = self._known.get(storage._cdata), storage.nbytes()
        if known is None:
            known = self._known[storage._cdata] = _Storage(storage, self._freed)
            known.address, known.device_type, known.size = storage._cdata, device_type, 0
        if known.size != size:
            self._now[known.device_type] += size - known.size
            known.size = size
            self._peak[known.device_type] = max(self._peak[known.device_type], self._now[known.device_type])

    def _freed(self, storage: _Storage) -> None:
        del self._known[storage.address]
        self._now[storage.device_type] -= storage.size


class _Storage(weakref.ref):
    """What is known of a live storage. Its Python object dies with its memory, whoever holds that: autograd for instance."""
    __slots__ = ("address", "device_type", "size")
    address: int
    device_type: str
    size: int


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or answers, in lists and tuples too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


@functools.cache
def makes_storage(func: Any) -> bool:
    """Whether what the operation answers is memory of its own, not that of an argument (a view of it, or itself)."""
    return func in ENTERS or any(answer.alias_info is None for answer in func._schema.returns)
