"""Room on the device for what ComfyUI's memory manager does not see: the student and its training state."""
from __future__ import annotations

from typing import Any

import comfy.model_management
import torch

EVERYTHING = 2**60      # bytes: more than any device has


def device() -> torch.device:
    """The device that ComfyUI computes on."""
    return comfy.model_management.get_torch_device()


def lacking(needed: int) -> str:
    """A sentence when this machine has less than `needed` bytes of its own memory free, else nothing."""
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    return f"it takes {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free" if free < needed else ""


def make_room(needed: int) -> None:
    """Has ComfyUI move its models off the device until `needed` bytes are free, as far as it can. On a CPU there is nothing to move."""
    if device().type != "cpu":
        comfy.model_management.free_memory(needed, device())


def release() -> None:
    """Hands memory that torch holds back to the device."""
    comfy.model_management.soft_empty_cache()


def unload(patcher: Any) -> None:
    """Has ComfyUI move this model off the device, and no other one; None is no model."""
    loaded = comfy.model_management.current_loaded_models
    comfy.model_management.free_memory(EVERYTHING, device(), keep_loaded=[other for other in loaded if other.model is not patcher])


def usage() -> dict[str, int]:
    """Bytes: of the device that are used, whoever uses them, and that it has; and that this process takes of the computer's memory."""
    import psutil
    total, free = int(comfy.model_management.get_total_memory(device())), int(comfy.model_management.get_free_memory(device()))
    if device().type == "cuda":         # what torch holds for its next tensors counts as used: nobody else can have it
        free, total = torch.cuda.mem_get_info(device())
    return {"used": total - free, "total": total, "process": psutil.Process().memory_info().rss}
