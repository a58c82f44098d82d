"""Which layout goes with which dtype, by the names that a user chooses them by, and what each dtype makes of a weight."""
from __future__ import annotations

import torch
from torch import Tensor

from ..errors import WanLiteError
from . import fp8, gguf_write

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALLOWED = {"folder": tuple(PLAIN), "single file": (*PLAIN, fp8.NAME), "diffusers folder": tuple(PLAIN), "LoRA": tuple(PLAIN), "GGUF": gguf_write.KINDS}
BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 1.0, "Q8_0": 34 / 32, "Q5_0": 22 / 32, "Q4_0": 18 / 32}      # of a weight in a block
LAYOUTS, DTYPES = tuple(ALLOWED), (*PLAIN, fp8.NAME, *gguf_write.KINDS)
WHY = {
    fp8.NAME: "fp8 is for ComfyUI: a folder's other readers do not know its scales and would compute nonsense.",
    **dict.fromkeys(gguf_write.KINDS, "That is a type of GGUF's."),
}
HOMES = {fp8.NAME: "Choose the format 'single file', or bf16, fp16 or fp32.",
         **dict.fromkeys(gguf_write.KINDS, "Choose the format 'GGUF', or bf16, fp16 or fp32.")}


def check_pair(layout: str, dtype: str) -> None:
    """Raises WanLiteError when no reader opens such a layout in such a dtype, and when what it is written with is not installed."""
    if layout not in ALLOWED or dtype not in DTYPES:
        raise WanLiteError(f"The format is {layout!r} and the dtype {dtype!r}.", f"Formats are {', '.join(LAYOUTS)}; dtypes are {', '.join(DTYPES)}.",
                           "Choose one of each.")
    if dtype not in ALLOWED[layout]:
        if layout == "GGUF":
            raise WanLiteError(f"A GGUF in {dtype} is not written.", "A plain student is smaller trouble as a single file.", "Choose Q8_0, Q5_0 or Q4_0.")
        raise WanLiteError(f"A {layout} in {dtype} is not written.", WHY[dtype], HOMES[dtype])
    if layout == "GGUF":
        gguf_write.check_installed()


def rounded(dtype: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor that a reader gets back from a file in this dtype: in it, or in fp32 where it was quantised."""
    if dtype == fp8.NAME:
        return fp8.rounded(name, tensor)
    if dtype in gguf_write.KINDS:
        return gguf_write.rounded(dtype, name, tensor)
    return tensor.to(PLAIN[dtype])
