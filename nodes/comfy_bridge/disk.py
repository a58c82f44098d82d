"""What WanLite keeps on disk in this ComfyUI: how much it is, and clearing it so that the next queue finds nothing that is gone."""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.distill.budget import free_disk
from ...wanlite_model.distill.clearing import Places, clear, lost, used
from ...wanlite_model.errors import WanLiteError
from . import folders
from .here import running_server

FREED = 5.0             # seconds in which a server that runs no graph has forgotten what its nodes handed out


def told(with_lost: bool) -> dict[str, Any]:
    """What GET /wanlite/disk answers; see routes. with_lost: what clearing would lose too, for which every model and LoRA is opened."""
    places = _places()
    sizes = {name: asdict(found) for name, found in used(places).items()}
    return {**sizes, "free": free_disk(places.runs), **(lost(places.runs, _saved(), _held) if with_lost else {})}


def cleared() -> dict[str, Any]:
    """Clears it, and what POST /wanlite/disk/clear answers; see routes."""
    forget()                # first: a MODEL that ComfyUI holds keeps its file from being removed on Windows
    result = clear(_places(), _held)
    forget()                # what a graph handed out meanwhile
    return {"freed": result.freed, "kept": [asdict(one) for one in result.kept]}


def forget() -> None:
    """Has ComfyUI run all nodes anew at the next queue, as its POST /free does. Waits for that where no graph runs: the next one could be faster."""
    server = running_server()
    if server is None:
        return
    server.prompt_queue.set_flag("free_memory", True)
    ends = time.monotonic() + FREED
    while "free_memory" in server.prompt_queue.get_flags(reset=False) and not _running() and time.monotonic() < ends:
        time.sleep(0.02)


def check_present(student: StudentHandle) -> None:
    """Raises WanLiteError when a student on a wire is no longer on disk; the next queue then makes it again, instead of handing it on as it is."""
    try:
        student.check_present()
    except WanLiteError:
        forget()
        raise


def _places() -> Places:
    return Places(**{name: folders.output_folder(name) for name in ("runs", "cache", "starts")})


def _saved() -> Iterator[Path]:
    """All files in which a student can have been saved."""
    yield from (path for name in folders.model_names() if (path := folders.model_path(name)) is not None and path.is_file())
    yield from folders.models_folder().glob("*.gguf")
    for name in folders.lora_names():
        with suppress(WanLiteError):            # removed since they were listed
            yield folders.lora_path(name)
    yield from folders.output_folder("diffusers").glob("*/*.safetensors")


def _running() -> list[Any]:
    """What the server's queue works on now."""
    server = running_server()
    return [] if server is None else server.prompt_queue.get_current_queue_volatile()[0]


def _held(path: Path) -> str:
    """A sentence when the graph that runs now can still hand out what lies there: it passes from node to node before a job takes its lock."""
    for node in (node for item in _running() for node in item[2].values()):
        kind, run_name = node.get("class_type"), node.get("inputs", {}).get("run_name")
        named = isinstance(run_name, list) or run_name == path.name         # a list: it comes through a link
        if kind == "WanLiteDistill" and named and path.parent == folders.output_folder("runs"):
            return "The graph that runs now names it."
        if kind == "WanLiteCreateStudent" and path.parent == folders.output_folder("starts"):
            return "The graph that runs now creates a student, which it may be."
    return ""
