"""GGUF files of a WAN, through the `gguf` package: its reader, and its definition of what each format's blocks unpack to.

They carry WAN's own names, as ComfyUI-GGUF and its kin write them. GGUF counts axes from the fastest, and a tensor whose rows do not fill
whole blocks lies there in another shape, with its own beside it in the header.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import WanLiteError
from ..files import regular
from .quantised import UNPACKED, UnknownFormat

GGUF = ".gguf"                          # how such a file's name ends, in lower case
SHAPE = "comfy.gguf.orig_shape."        # ComfyUI-GGUF's key of a tensor that lies in another shape
MOST_PIECES = 200_000                   # of a header, ten a tensor or so; WAN's largest have 1,300 tensors
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One tensor of an open GGUF file: its bytes, mapped, and the name of the format that they are in."""
    data: np.ndarray = field(repr=False)
    kind: str
    shape: tuple[int, ...]

    @property
    def packed(self) -> bool:
        """Whether the file keeps it in fewer bits than it is handed out in."""
        return self.kind not in FLOATS

    @property
    def dtype(self) -> torch.dtype:
        return FLOATS.get(self.kind, UNPACKED)

    def read(self, _: Mapping[Path, BinaryIO]) -> Tensor:
        """The tensor in memory of its own, unpacked in float32 and rounded once."""
        return unpacked(self.data, self.kind, self.shape).to(self.dtype)


def read_gguf(path: Path) -> tuple[dict[str, Block], dict[str, str]]:
    """The tensors of a file by their names in it, and the texts that its header holds: of a student, what WanLite says about it.

    Raises WanLiteError when it is not whole, UnknownFormat when some could not be unpacked.
    """
    gguf = _library(path.name)
    try:
        reader = _reader(gguf)(regular(path))
        shapes = {name.removeprefix(SHAPE): tuple(int(told.parts[i][0]) for i in told.data)
                  for name, told in reader.fields.items() if name.startswith(SHAPE)}
        found = {tensor.name: Block(data=tensor.data, kind=tensor.tensor_type.name,
                                    shape=shapes.get(tensor.name, tuple(reversed(tensor.shape.tolist())))) for tensor in reader.tensors}
        texts = {name: bytes(told.parts[told.data[0]]).decode("utf-8") for name, told in reader.fields.items()
                 if told.types == [gguf.GGUFValueType.STRING]}
        wrong = next((tensor.name for tensor in reader.tensors if math.prod(found[tensor.name].shape) != tensor.n_elements), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} does not fill its shape")
    except (OSError, ValueError, KeyError, IndexError, OverflowError, TypeError, RuntimeError) as error:
        raise WanLiteError(f"{path.name} is not a whole GGUF file ({error}).", "", "Download or copy the file again.") from error
    for kind, name in {block.kind: name for name, block in found.items() if block.packed}.items():
        _check_kind(gguf, path.name, kind, name)
    return found, texts


def _reader(gguf: ModuleType) -> type:
    class Reader(gguf.GGUFReader):
        """The package's own takes what lies behind the file's end for nothing at all, and makes an array of every number that a list is said to have."""
        left = MOST_PIECES

        def _get(self, offset: int, dtype: Any, count: Any = 1, *others: Any, **options: Any) -> np.ndarray:
            found = super()._get(offset, dtype, count, *others, **options)
            self.left -= 1
            if len(found) < count or self.left < 0:
                raise ValueError("its header has no end")
            return found
    return Reader


def unpacked(data: np.ndarray, kind: Any, shape: tuple[int, ...]) -> Tensor:
    """What bytes in that format (its name, or its number in GGUF) are, of this shape: floats as they are, all else in float32.

    Raises WanLiteError where the `gguf` package is absent, or does not know the format.
    """
    gguf = _library("This model")
    kind = gguf.GGMLQuantizationType[kind] if isinstance(kind, str) else gguf.GGMLQuantizationType(int(kind))
    if kind.name in FLOATS:
        return torch.from_numpy(np.array(data)).view(FLOATS[kind.name]).reshape(shape)
    try:
        return torch.from_numpy(gguf.dequantize(data, kind)).reshape(shape)
    except NotImplementedError as error:
        raise _unknown("This model", kind.name, "some of its tensors") from error


def _check_kind(gguf: ModuleType, file: str, kind: str, name: str) -> None:
    """Unpacks one block, so that a file is refused before it is worked on for minutes."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise _unknown(file, kind, repr(name)) from error


def _unknown(what: str, kind: str, where: str) -> UnknownFormat:
    return UnknownFormat(f"{what} keeps {where} as {kind}.", "The gguf package that is installed unpacks no such format.",
                         "Choose a Q8_0, a K-quant or a bf16 file of this model.")


def _library(what: str) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise WanLiteError(f"{what} is in GGUF, and the Python package gguf that unpacks it is not there.", "ComfyUI-GGUF needs the same package.",
                           "Install it into the Python that runs this, with `python -m pip install gguf`, and start again.") from error
    return gguf
