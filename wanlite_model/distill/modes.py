"""Training where no graph can be recorded: ComfyUI runs nodes in inference mode, whose tensors can never be trained."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, TypeVar

import torch

Yielded, Result = TypeVar("Yielded"), TypeVar("Result")


def trains(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that make or change weights. Of a generator each stretch runs so; at a yield the consumer has its own mode."""
    @functools.wraps(function)
    def stretches(*args: Any, **kwargs: Any) -> Any:
        return _stretches(function(*args, **kwargs))

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)
    return stretches if inspect.isgeneratorfunction(function) else outside


def _stretches(work: Generator[Yielded, None, Result]) -> Generator[Yielded, None, Result]:
    with closing(work):
        while True:
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    value = next(work)
            except StopIteration as end:
                return end.value
            yield value
