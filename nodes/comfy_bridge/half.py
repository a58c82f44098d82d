"""The student's own forward in fp32, block by block, and how near its activations come to the limit of fp16.

ComfyUI computes a WAN in fp16 on many cards, whatever dtype its file has. What passes 65,504 there is infinite, and the picture black.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
from torch import Tensor, nn

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.cond import Cond
from ...wanlite_model.transformer import WanLiteStudent
from . import memory

LIMIT = 65504.0             # torch.finfo(torch.float16).max
NEAR = 0.5                  # of the limit: a real prompt, more frames or another seed may well double what was seen on a small state


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The largest absolute value that any module answered, or that the stream between blocks held, and where.

    It was seen on one small state of noise with a random text: it covers what the weights themselves blow up, not every prompt.
    """
    value: float
    where: str

    @property
    def told(self) -> str:
        if self.value <= NEAR * LIMIT:
            return f"In fp16, which ComfyUI runs WAN in on many cards, its activations reach {self.value:,.0f} of {LIMIT:,.0f} on a small state of noise."
        return (f"Warning: in fp16, which ComfyUI runs WAN in on many cards, {self.where} reaches {self.value:,.0f} and the limit is {LIMIT:,.0f}. "
                "Start ComfyUI with --bf16-unet, or train on from an earlier student with a lower learning rate.")


def reference(student: StudentHandle, rounded: Callable[[str, Tensor], Tensor], x: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Peak]:
    """(velocity, peak) of the student with each weight as `rounded` makes it.

    Holds one block, which is filled with the weights of each in its turn: all of them in fp32 would take twice what the file does.
    """
    config = student.config
    module = WanLiteStudent.from_wan(config.resized(num_layers=1, ffn_dim=config.ffn_dim), device="meta").to_empty(device="cpu").eval()
    block, at = module.blocks[0], [-1]
    with student.open() as opened:
        def fill(part: nn.Module, path: str) -> None:
            places = {path + name: place for name, place in part.state_dict().items()}
            for name, tensor in opened.tensors(places):
                comfy.model_management.throw_exception_if_processing_interrupted()
                places[name].copy_(rounded(name, tensor))

        def next_block(*_: Any) -> None:
            at[0] += 1
            fill(block, f"blocks.{at[0]}.")

        fill(module, "")
        block.register_forward_pre_hook(next_block)
        peak = _watch(module, at)
        module.blocks = nn.ModuleList([block] * config.num_layers)
        velocity = cond.asked(module, x, sigma)
    return velocity, peak()


def _watch(module: WanLiteStudent, at: list[int]) -> Callable[[], Peak]:
    """Has every module tell its largest answer; what comes back tells the largest of all. at: [the block that is at work]."""
    largest: dict[str, float] = {}

    def watch(path: str) -> Callable[..., None]:
        def answered(_: nn.Module, __: Any, answer: Tensor) -> None:
            where = path.replace("blocks.0", f"block {at[0]}", 1).replace(".", ": ", 1) if path.startswith("blocks.0") else path
            largest[where] = max(largest.get(where, 0.0), float(answer.abs().max()))
        return answered

    for path, part in module.named_modules():
        if path and not isinstance(part, nn.ModuleList):
            part.register_forward_hook(watch(path))

    def peak() -> Peak:
        where = max(largest, key=largest.__getitem__)
        return Peak(value=largest[where], where=where)
    return peak


def forward_in_half(velocity: Callable[[], Tensor], expected: Tensor) -> tuple[str, ...]:
    """A sentence on one real forward in fp16, where this ComfyUI computes in it."""
    if not comfy.model_management.should_use_fp16(memory.device()):
        return ()
    found = velocity()
    if not bool(found.isfinite().all()):
        return ("Warning: one forward in fp16, which ComfyUI chooses here, came out with values that are not finite: pictures will be black. "
                "Start ComfyUI with --bf16-unet.",)
    return (f"One forward in fp16 is finite and changes the velocity by {float((found - expected).norm() / expected.norm()):.2%}.",)
