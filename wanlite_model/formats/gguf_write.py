"""Students as GGUF, in the layout that ComfyUI-GGUF's converter has for a WAN: WAN's own names, the blocks' matrices quantised.

Written and read with the `gguf` package (ggml-org, MIT), which is not needed for anything else and never installed by WanLite.
"""
from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import WanConfig
from ..errors import WanLiteError
from ..files import patiently
from .card import StudentCard, header
from .container import checked
from .fp8 import is_matrix
from .gguf_file import GGUF, read_gguf, unpacked
from .keymap import wan_shapes
from .place import check_name
from .saving import WORKFLOW_END, SaveReport, Verified, check_free, provenance, put, saved, stem, write_text_json
from .workflow import stock_workflow

KINDS = ("Q8_0", "Q5_0", "Q4_0")
ROW = 32                                # weights that share a scale: only rows of a multiple can be quantised
ARCHITECTURE = "wan"                    # what ComfyUI-GGUF's loader looks for
LARGE = ("text_embedding.", "time_embedding.", "time_projection.", "img_emb.proj.")         # layers outside the blocks whose matrices are in fp16


def write_gguf(destination: Path, *, config: WanConfig, read: Callable[[Iterable[str]], Iterable[tuple[str, Tensor]]], kind: str,
               card: StudentCard | None = None, verify: Callable[[Path], Verified] | None = None, overwrite: bool = False,
               workflow_folder: Path | None = None) -> SaveReport:
    """Writes `<name>.gguf`, quantised as `kind` says. read: (name, tensor) of these names in this order, one at a time.

    Otherwise as write_student. Raises WanLiteError too when the gguf package is not installed.
    """
    check_installed()
    destination = Path(destination).absolute()
    name = check_name(stem(destination, GGUF))
    graph = stock_workflow(destination.name, card or StudentCard(), config)
    workflow = Path(workflow_folder).absolute() / (name + WORKFLOW_END) if workflow_folder and graph else None
    check_free(destination, workflow, overwrite)
    shapes = wan_shapes(config)

    def write(new: Path) -> int:
        part = new.with_suffix(".part")                 # no loader lists this ending while it is being written
        size = _write(part, shapes, read(shapes), kind, header(provenance(card)))
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        patiently(os.rename, part, new)
        return size

    size, verified = put(destination, write, verify, {workflow: lambda path: write_text_json(path, graph)} if workflow else {})
    plain = sum(is_matrix(layer, shape) and stored_as(kind, layer, shape) != kind for layer, shape in shapes.items())
    notes = (f"{plain} of its matrices are in fp16: {kind} takes rows of a multiple of {ROW}, and FFN {config.ffn_dim} is none.",) if plain else ()
    return SaveReport(path=destination, file=destination, bytes=size, verified=verified,
                      sentence=saved(destination.name, config, size, verified), workflow=workflow, notes=notes)


def read_back(file: Path, expected: Iterable[tuple[str, Tensor]]) -> None:
    """Compares every tensor of a GGUF, unpacked by the gguf package, with what it should be. Raises WanLiteError when one is not."""
    found, _ = read_gguf(file)
    for name, tensor in expected:
        stored = found.pop(name, None)
        if stored is None or stored.shape != tuple(tensor.shape) or not torch.equal(unpacked(stored.data, stored.kind, stored.shape).float(), tensor):
            raise WanLiteError(f"{name!r} of {file.name} reads back differently from what was written.", "", "Check the disk, then save again.")
    if found:
        raise WanLiteError(f"{file.name} holds {min(found)!r}, which this WAN does not have.", "", "Save again.")
    del stored
    gc.collect()                                        # it is renamed next, which Windows refuses while it is mapped


def rounded(kind: str, name: str, tensor: Tensor) -> Tensor:
    """What a reader gets back of this tensor, in fp32."""
    stored = stored_as(kind, name, tensor.shape)
    return unpacked(_packed(name, tensor, stored), stored, tuple(tensor.shape)).float()


def stored_as(kind: str, name: str, shape: tuple[int, ...]) -> str:
    """The GGUF type of a tensor. Small ones, modulation, the patch embedding and the head are kept in F32, other large layers in F16."""
    if is_matrix(name, shape):
        return kind if shape[-1] % ROW == 0 else "F16"
    return "F16" if name.startswith(LARGE) and len(shape) == 2 else "F32"


def check_installed() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise WanLiteError("GGUF files are written with the package gguf, which is not installed.", "",
                           f'Run: "{sys.executable}" -m pip install gguf, and restart ComfyUI; or choose another format.')


def _write(file: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]], kind: str, metadata: Mapping[str, str]) -> int:
    """Streams the tensors, which come in the order of `shapes`; returns their bytes."""
    import gguf
    writer = gguf.GGUFWriter(path=None, arch=ARCHITECTURE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for key, value in metadata.items():
        writer.add_string(key, value)
    sizes = {name: _bytes(stored_as(kind, name, shape), shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=_type(stored_as(kind, name, shape)))
    try:
        writer.write_header_to_file(path=file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        left = list(shapes)
        for name, tensor in tensors:
            if not left or name != left.pop(0) or tuple(tensor.shape) != tuple(shapes[name]):
                raise WanLiteError(f"{name!r} of shape {list(tensor.shape)} is not the tensor of this WAN that comes next.")
            writer.write_tensor_data(_packed(name, tensor, stored_as(kind, name, shapes[name])))
        if left:
            raise WanLiteError(f"{left[0]!r} was never given, and {len(left) - 1} others.", f"This WAN has {len(shapes)} tensors.")
    finally:
        writer.close()
    return sum(sizes.values())


def _packed(name: str, tensor: Tensor, stored: str) -> np.ndarray:
    """The tensor as the file holds it. Raises WanLiteError unless all its values are finite."""
    import gguf
    values = checked(name, tensor.detach(), torch.float16 if stored == "F16" else torch.float32)
    return gguf.quants.quantize(values.numpy(), _type(stored))


def _type(stored: str) -> Any:
    import gguf
    return gguf.GGMLQuantizationType[stored]


def _bytes(stored: str, shape: tuple[int, ...]) -> int:
    import gguf
    weights, size = gguf.GGML_QUANT_SIZES[_type(stored)]
    return int(np.prod(shape)) // weights * size
