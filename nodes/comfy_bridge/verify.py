"""Whether ComfyUI's own loader opens a file and computes what was meant: one small forward against a velocity recorded before."""
from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.flow import TIMESTEPS
from ...wanlite_model.formats.keymap import wan_size
from ...wanlite_model.formats.write import Verified
from ...wanlite_model.teacher import Cond
from ...wanlite_model.transformer import WanLiteStudent
from . import load, memory
from .teacher import ComfyTeacher

log = logging.getLogger(__name__)

READER, LORA_READER = "ComfyUI's Load Diffusion Model", "ComfyUI's LoRA loader"
OPENED = 1.1        # memory of ComfyUI's copy as a share of the file, a tenth for the rest
LIMIT = 1e-3        # fp32 on two devices differs by 1e-5; one wrong tensor by far more


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recorded:
    """A state and the velocity [1, C, 1, 8, 8] that weights of `dtype` answer there; velocity is None where it could not be had, and why."""
    dtype: torch.dtype
    x: Tensor
    sigma: Tensor
    cond: Cond
    velocity: Tensor | None
    why: str = ""


def record(student: StudentHandle, dtype: torch.dtype) -> Recorded:
    """What the student answers with its weights rounded to `dtype`, computed in fp32 on the CPU by our own module."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        x = torch.randn(1, student.config.in_dim, 1, 8, 8, generator=generator)
        sigma, cond = torch.tensor([0.7]), Cond(context=torch.randn(1, 16, 4096, generator=generator) * 0.1)
        # Asked before, and not only caught: a system that runs out of memory swaps for minutes, or kills ComfyUI without a word.
        velocity, why = None, memory.lacking(int(OPENED * dtype.itemsize * wan_size(student.config)))
        if not why:
            try:
                velocity = _velocity(student, dtype, x, sigma, cond)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "alloc" not in str(error):
                    raise
                why = f"memory ran out ({error})"
        why = why and f"one forward of it in fp32, to compare with, could not be computed: {why}."
    return Recorded(dtype=dtype, x=x, sigma=sigma, cond=cond, velocity=velocity, why=why)


def _velocity(student: StudentHandle, dtype: torch.dtype, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    """Holds one block, which is filled with the weights of each in its turn: all of them in fp32 would take twice what the file does."""
    config, numbers = student.config, itertools.count()
    module = WanLiteStudent.from_wan(config.resized(num_layers=1, ffn_dim=config.ffn_dim), device="meta").to_empty(device="cpu").eval()
    block = module.blocks[0]
    with student.open() as opened:
        def fill(part: nn.Module, path: str) -> None:
            places = {path + name: place for name, place in part.state_dict().items()}
            for name, tensor in opened.tensors(places):
                places[name].copy_(tensor.to(dtype))

        fill(module, "")
        block.register_forward_pre_hook(lambda *_: fill(block, f"blocks.{next(numbers)}."))
        module.blocks = nn.ModuleList([block] * config.num_layers)
        return module(x, TIMESTEPS * sigma, cond.context)


def verifier(recorded: Recorded, reader: str = READER, opened: Callable[[], Any] | None = None) -> Callable[[Path], Verified]:
    """What write_student calls with the new file before it is put in place. Its error ends the save.

    opened: makes the MODEL that is compared; by default the file is one.
    """
    def verify(file: Path) -> Verified:
        if recorded.velocity is None:
            return Verified(reader=reader, difference=None, why=recorded.why)
        difference = _difference(load.open_model(file, dtype=recorded.dtype) if opened is None else opened(), recorded)
        if not difference < LIMIT:
            raise WanLiteError(f"{reader} opened the new file, and its answer differs by {difference:.1%}.", "It should be the same.",
                               "Nothing was saved; please report this with the student's size.")
        return Verified(reader=reader, difference=difference)
    return verify


def _difference(model: Any, recorded: Recorded) -> float:
    if hasattr(model, "set_model_compute_dtype"):
        model.set_model_compute_dtype(torch.float32)        # judges the file, not the precision of this machine's fast path
    velocity = ComfyTeacher(model).velocity(recorded.x, recorded.sigma, recorded.cond)
    del model
    gc.collect()                                            # the file is renamed next, which Windows refuses while it is mapped
    comfy.model_management.cleanup_models_gc()
    comfy.model_management.soft_empty_cache()
    return float((velocity - recorded.velocity).abs().max() / recorded.velocity.abs().max())
