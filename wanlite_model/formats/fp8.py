"""Weights in fp8, in the one encoding that ComfyUI reads from 0.3.75 on: float8_e4m3fn matrices, a scale each, and a header that names them.

ComfyUI: comfy/model_detection.py (detect_layer_quantization) in 0.3.75, comfy/utils.py (convert_old_quants) in newer ones. Wan-Video's code
and diffusers do not know the scales.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .quantised import NEW, header_of

NAME, DTYPE = "fp8", torch.float8_e4m3fn
LARGEST = 448.0                         # of float8_e4m3fn
SMALLEST = -100                         # exponent of a scale: far below any weight, far above where fp32 loses numbers
REST = torch.bfloat16                   # of all that is small or decides much: embeddings, norms, modulation, biases, the head
WEIGHT, SCALE = ".weight", NEW[0]


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether this tensor is one of the blocks' large matrices: of attention and FFN."""
    return name.startswith("blocks.") and name.endswith(WEIGHT) and len(shape) == 2


def shapes(plain: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """What such a file holds, of the tensors of a plain one."""
    return {**plain, **{layer + SCALE: () for layer in _layers(plain)}}


def metadata(plain: Mapping[str, Sequence[int]]) -> dict[str, str]:
    return header_of(dict.fromkeys(_layers(plain), "float8_e4m3fn"))


def encoded(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as they are stored, each matrix followed by its scale: a reader multiplies the two."""
    for name, tensor in tensors:
        if not is_matrix(name, tensor.shape):
            yield name, tensor.to(REST)
            continue
        with torch.inference_mode(False), torch.no_grad():
            quantised, scale = _quantised(tensor)
        yield name, quantised
        yield name.removesuffix(WEIGHT) + SCALE, scale


def rounded(name: str, tensor: Tensor) -> Tensor:
    """What a reader gets back, in fp32."""
    if not is_matrix(name, tensor.shape):
        return tensor.to(REST).float()
    quantised, scale = _quantised(tensor)
    return quantised.float() * scale


def _quantised(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 [out, in], its scale in fp32).

    A tensor's largest value over 448, rounded up to a power of two: as precise, since fp8 is a floating point format, and the product is exact
    in bf16 and fp16, so that a reader that computes in those rounds nothing a second time.
    """
    values = tensor.float()
    largest = float(values.abs().max())
    exponent = math.ceil(math.log2(largest / LARGEST)) if 0 < largest < math.inf else 0      # what is not finite, the writer refuses
    scale = 2.0 ** max(SMALLEST, exponent)
    return (values / scale).to(DTYPE), torch.tensor(scale)


def _layers(plain: Mapping[str, Sequence[int]]) -> list[str]:
    return [name.removesuffix(WEIGHT) for name, shape in plain.items() if is_matrix(name, shape)]
