"""Whether a real reader opens a file and computes what was meant: one small forward against a velocity recorded before."""
from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.cond import Cond
from ...wanlite_model.config import CLIP_DIM, FLF_TOKENS, TEXT_DIM, WanConfig
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.keymap import wan_size
from ...wanlite_model.formats.pairs import BYTES, PLAIN, rounded
from ...wanlite_model.formats.saving import Verified
from . import memory
from .half import Peak, forward_in_half, reference
from .teacher import ComfyTeacher

READER, LORA_READER = "ComfyUI's Load Diffusion Model", "ComfyUI's LoRA loader"
OPENED = 1.1        # memory of a reader's copy as a share of the file, a tenth for the rest
CLIP_TOKENS = FLF_TOKENS // 2     # of one picture
LIMIT = 1e-3        # fp32 on two devices differs by 1e-5; one wrong tensor by far more


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recorded:
    """A state and the velocity [1, C, 1, 8, 8] that the rounded weights answer there; velocity is None where it could not be had, and why.

    changed: by how much quantising itself changes the velocity of the bf16 student, relative, root mean square. peak: of its activations.
    """
    x: Tensor
    sigma: Tensor
    cond: Cond
    velocity: Tensor | None
    why: str = ""
    changed: float | None = None
    peak: Peak | None = None


def example(config: WanConfig) -> tuple[Tensor, Tensor, Cond]:
    """(x [1, C, 1, 8, 8], sigma [1], condition) that every reader is asked: 16 tokens of noise, a random text of 16, and pictures where there are some."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    beside = config.in_dim - config.out_dim                 # channels of mask and pictures
    pictures = 2 if config.model_type == "flf2v" else 1
    cond = Cond(context=noise(16, TEXT_DIM) * 0.1, image=noise(beside, 1, 8, 8) if beside else None,
                clip_fea=noise(pictures * CLIP_TOKENS, CLIP_DIM) if config.img_emb else None)
    return noise(config.out_dim, 1, 8, 8), torch.tensor([0.7]), cond


def record(student: StudentHandle, dtype: str) -> Recorded:
    """What the student answers with its weights rounded as a file in `dtype` rounds them, computed in fp32 on the CPU by our own module."""
    with torch.inference_mode(False), torch.no_grad():
        x, sigma, cond = example(student.config)
        # Asked before, and not only caught: a system that runs out of memory swaps for minutes, or kills ComfyUI without a word.
        velocity, changed, peak, why = None, None, None, memory.lacking(int(OPENED * BYTES[dtype] * wan_size(student.config)))
        if not why:
            try:
                velocity, peak = reference(student, lambda name, tensor: rounded(dtype, name, tensor), x, sigma, cond)
                if dtype not in PLAIN:
                    plain, _ = reference(student, lambda name, tensor: rounded("bf16", name, tensor), x, sigma, cond)
                    changed = float((velocity - plain).norm() / plain.norm())
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "alloc" not in str(error):
                    raise
                velocity, why = None, f"memory ran out ({error})"
        why = why and f"one forward of it in fp32, to compare with, could not be computed: {why}."
    return Recorded(x=x, sigma=sigma, cond=cond, velocity=velocity, why=why, changed=changed, peak=peak)


def verifier(recorded: Recorded, opened: Callable[[Path], Any], reader: str = READER, limit: float = LIMIT) -> Callable[[Path], Verified]:
    """What a save calls with the new file before it is put in place. Its error ends the save. opened: makes the MODEL that is compared."""
    def verify(file: Path) -> Verified:
        if recorded.velocity is None:
            return Verified(reader=reader, difference=None, why=recorded.why)
        model = opened(file)
        difference = _difference(_velocity(model, recorded, torch.float32), recorded)
        _check(difference, reader, limit)
        notes = forward_in_half(lambda: _velocity(model, recorded, torch.float16), recorded.velocity)
        del model
        _let_go()
        return Verified(reader=reader, difference=difference, notes=notes)
    return verify


def compared(velocity: Tensor, recorded: Recorded, reader: str) -> Verified:
    """The verdict on another reader's velocity. Raises WanLiteError when it is another."""
    difference = _difference(velocity, recorded)
    _check(difference, reader, LIMIT)
    return Verified(reader=reader, difference=difference)


def found_out(recorded: Recorded, dtype: str) -> list[str]:
    """What was found out while recording, in sentences."""
    quantised = [f"{dtype} itself changes the velocity of the bf16 student by {recorded.changed:.1%}."] if recorded.changed is not None else []
    return quantised + ([recorded.peak.told] if recorded.peak else [])


def _velocity(model: Any, recorded: Recorded, dtype: torch.dtype) -> Tensor:
    """Of a MODEL that nobody else holds: computed in `dtype` throughout, which judges the file and not the precision of a card's fast path."""
    if hasattr(model, "set_model_compute_dtype"):
        model.set_model_compute_dtype(dtype)
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "_full_precision_mm"):           # else a card that multiplies in fp8 rounds what comes in as well
            module._full_precision_mm = True
        if hasattr(module, "dequant_dtype"):                # of this layer, not of ComfyUI-GGUF's class, which all its models share
            module.dequant_dtype = dtype
    return ComfyTeacher(model).velocity(recorded.x, recorded.sigma, recorded.cond)


def _difference(velocity: Tensor, recorded: Recorded) -> float:
    return float((velocity - recorded.velocity).abs().max() / recorded.velocity.abs().max())


def _check(difference: float, reader: str, limit: float) -> None:
    if not difference < limit:
        raise WanLiteError(f"{reader} opened the new file, and its answer differs by {difference:.1%}.", "It should be the same.",
                           "Nothing was saved; please report this with the student's size.")


def _let_go() -> None:
    gc.collect()                                            # the file is renamed next, which Windows refuses while it is mapped
    comfy.model_management.cleanup_models_gc()
    # As ComfyUI does after each node: newer ones keep what they read from until then, and the file with it.
    getattr(comfy.model_management, "reset_cast_buffers", comfy.model_management.soft_empty_cache)()
