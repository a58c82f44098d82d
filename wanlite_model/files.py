"""Small files that are whole or absent: written beside, then put in place."""
from __future__ import annotations

import gc
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import WanLiteError

TEMPORARY = ".tmp"
LARGEST_JSON = 2**26    # bytes; an index of a hundred thousand tensors has less than a quarter
ENDINGS = (".safetensors", ".sft")      # of a file of weights, in lower case


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary)` and puts the result at `path` at once, on the disk and not only in its cache.

    Raises WanLiteError when it cannot be written, a full disk for instance; then the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:             # a power cut after the replacement must not find an empty file
            os.fsync(file.fileno())
        patiently(os.replace, temporary, path)
    except (OSError, SafetensorError) as error:
        raise WanLiteError(f"{path.name} could not be written ({error}).", "What was there before is intact.",
                           "Free disk space, or close what uses the file, and try again.") from error
    finally:
        temporary.unlink(missing_ok=True)


def patiently(move: Callable[[Path, Path], Any], source: Path, goal: Path) -> None:
    """os.rename or os.replace, tried for a second: on Windows a reader that is just being closed, or a virus scanner, holds a file for a moment."""
    for attempt in range(4):
        try:
            move(source, goal)
            return
        except PermissionError:
            if attempt == 3:
                raise
            if attempt == 0:
                gc.collect()                    # a mapping that only a reference cycle keeps alive
            time.sleep(0.1 * 2**attempt)


def sweep(folder: Path) -> None:
    """Removes what a killed process left half-written. Only for a folder that nobody else writes to."""
    for left in folder.glob(f".*{TEMPORARY}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """One readable JSON file, at once."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Raises OSError or ValueError when it is no JSON that anyone meant to be read."""
    if regular(path).stat().st_size > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON // 2**20} MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def regular(path: Path) -> Path:
    """The path again. Raises OSError when no file is there: a pipe, for instance, would be waited for, for ever."""
    if not path.is_file():
        raise OSError(f"{path.name} is no file")
    return path
