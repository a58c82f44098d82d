"""Long measurements: each module is one command and prints one table."""
from collections.abc import Generator
from typing import Any, TypeVar

Result = TypeVar("Result")


def result_of(making: Generator[Any, None, Result]) -> Result:
    """Runs a generator of progress to its end and returns what it returns."""
    while True:
        try:
            next(making)
        except StopIteration as end:
            return end.value
