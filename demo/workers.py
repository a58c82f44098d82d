"""A few threads with one core each, for parts of a batch.

PyTorch's own threads meet after every operation; where another program takes a core for a moment, all of them wait,
hundreds of times a step. These meet once.
"""
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

COUNT = min(4, os.cpu_count() or 1)


class Workers:
    """Use as a context: inside it, this process's PyTorch runs every operation on one core."""

    def __enter__(self) -> "Workers":
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(COUNT)
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads_before)

    def map(self, function: Callable, *parts: Iterable) -> list[Any]:
        """[function(*arguments) for arguments in zip(*parts)], side by side."""
        return list(self._pool.map(function, *parts))
