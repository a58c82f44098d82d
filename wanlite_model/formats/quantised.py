"""Weights that a safetensors file keeps in fewer bits: how it says so, and what they are unpacked.

A weight is `stored * scale`, with one scale for all of it or one for each row. Three markings are in use, all of ComfyUI's (its
QUANTIZATION.md, and convert_old_quants in comfy/utils.py); in each of them any layer may also be left as it was:

    scaled_fp8, a tensor          <layer>.scale_weight, <layer>.scale_input
    _quantization_metadata        <layer>.weight_scale, <layer>.input_scale; the header names the layers and their formats
    <layer>.comfy_quant, a tensor <layer>.weight_scale, <layer>.input_scale; it holds the JSON of its layer

Scales of inputs serve matrix products in float8 and are no part of the weights. Float8 without any marking is what it says.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import WanLiteError
from .container import DTYPES, Entry, Header, read_tensor

# What a weight of fewer bits is handed out in: WAN was released in it, and forwards compute in it. On normally distributed weights its rounding
# is a third of the error that Q8_0, the finest of these formats, has made already (5% on top of it), and a thirteenth of float8's. float16 rounds
# less, but it ends at 65504 and thins out below 6e-5, and nobody has promised that a scale keeps between.
UNPACKED = torch.bfloat16
FLOATS = {"F32", "F16", "BF16"}
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}      # ComfyUI's name -> the container's
NAMES = {stored: name for name, stored in FORMATS.items()}
HEADER, MARK, OF_LAYER = "_quantization_metadata", "scaled_fp8", ".comfy_quant"
OLD, NEW = (".scale_weight", ".scale_input"), (".weight_scale", ".input_scale")
MAX_JSON = 2**16                        # bytes of a layer's own note


class UnknownFormat(WanLiteError):
    """A file that may well be whole, in a format that ComfyUI may know and this reader does not."""


class Place(NamedTuple):
    """Where a tensor is: its file, its entry in that file's header, and the scale that it is to be multiplied by, if there is one."""
    path: Path
    entry: Entry
    scale: Place | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def packed(self) -> bool:
        """Whether the file keeps it in fewer bits than it is handed out in."""
        return self.entry.dtype not in FLOATS

    @property
    def dtype(self) -> torch.dtype:
        return UNPACKED if self.packed else DTYPES[self.entry.dtype]

    def read(self, files: Mapping[Path, BinaryIO]) -> Tensor:
        """The tensor in memory of its own, unpacked: multiplied in float32 and rounded once."""
        stored = read_tensor(files[self.path], self.entry)
        if self.scale is None:
            return stored.to(self.dtype)
        return stored.float().mul_(self.scale.read(files).float()).to(self.dtype)


def header_of(formats: Mapping[str, str]) -> dict[str, str]:
    """The header's entry that formats_told reads. formats: {layer: ComfyUI's name}."""
    return {HEADER: json.dumps({"format_version": "1.0", "layers": {layer: {"format": name} for layer, name in formats.items()}})}


def formats_told(headers: Iterable[Header], prefix: str) -> dict[str, Any]:
    """{layer without the prefix: its fields}, as the headers of the files name them. Raises WanLiteError when that cannot be read."""
    told: dict[str, Any] = {}
    for header in headers:
        if HEADER in header.metadata:
            layers = _fields(header.metadata[HEADER], HEADER).get("layers")
            if not isinstance(layers, dict):
                raise WanLiteError(f"The header's {HEADER} names no layers.", "", "Download the file again.")
            told |= {name.removeprefix(prefix): fields for name, fields in layers.items()}
    return told


def with_scales(places: Mapping[str, Place], told: Mapping[str, Any]) -> dict[str, Place]:
    """The weights alone, those of fewer bits with their scales; what belongs to no layer that is marked stays, for a strict reader to report.

    told: see formats_told. Raises UnknownFormat, by name, on a layer that this reader cannot unpack.
    """
    found = dict(places)
    layers = {**told, **{name.removesuffix(OF_LAYER): _noted(name, found.pop(name)) for name in places if name.endswith(OF_LAYER)}}
    companions = dict.fromkeys(layers, NEW)
    if MARK in found:
        del found[MARK]
        old = [name.removesuffix(suffix) for suffix in OLD for name in places if name.endswith(suffix)]
        companions |= dict.fromkeys(old, OLD)
        layers |= {layer: {"format": NAMES.get(dtype := places[f"{layer}.weight"].entry.dtype, dtype)} for layer in old
                   if layer + OLD[0] in places and f"{layer}.weight" in places}
    for layer, (scale, of_input) in companions.items():
        if f"{layer}.weight" in found:
            if layer in layers:
                found[f"{layer}.weight"] = _scaled(layer, layers[layer], found[f"{layer}.weight"], found.pop(layer + scale, None))
            found.pop(layer + of_input, None)
    return found


def _scaled(layer: str, fields: Any, weight: Place, scale: Place | None) -> Place:
    """The weight with its scale. Raises UnknownFormat unless the two are what the fields say, in a format that can be unpacked."""
    name = fields.get("format") if isinstance(fields, dict) else None
    rotated = name == "int8_tensorwise" and any(part.get("convrot") for part in (fields, fields.get("params")) if isinstance(part, dict))
    if not isinstance(name, str) or name not in FORMATS or rotated:
        raise _unknown(layer, f"{name} with convrot" if rotated else str(name))
    if weight.entry.dtype != FORMATS[name] or scale is None or scale.packed:
        kept = "no scale" if scale is None else f"a scale in {scale.entry.dtype}"
        raise _unknown(layer, f"{name}, in {weight.entry.dtype} with {kept}")
    rows = weight.shape[:1] + (1,) * (len(weight.shape) - 1)
    if scale.shape not in ((), (1,), rows):
        raise _unknown(layer, f"{name} in blocks, with scales of shape {list(scale.shape)}")
    return weight._replace(scale=scale)


def _noted(name: str, place: Place) -> dict[str, Any]:
    """The JSON in a layer's own tensor."""
    if place.entry.dtype != "U8" or len(place.shape) != 1 or place.shape[0] > MAX_JSON:
        raise WanLiteError(f"{name!r} is {place.entry.dtype} of shape {list(place.shape)}.", "It holds JSON.", "Download the file again.")
    with place.path.open("rb") as file:
        return _fields(bytes(read_tensor(file, place.entry).tolist()), name)


def _fields(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WanLiteError(f"{where} cannot be read as JSON ({error}).", "It names the format of layers.", "Download the file again.") from error
    if not isinstance(fields, dict):
        raise WanLiteError(f"{where} holds no fields.", "It names the format of layers.", "Download the file again.")
    return fields


def _unknown(layer: str, kept: str) -> UnknownFormat:
    return UnknownFormat(f"{layer} is kept as {kept}.",
                         f"This reader unpacks {', '.join(FORMATS)}, each with one scale, or one for each row.",
                         "Open the file with ComfyUI's Load Diffusion Model and connect its MODEL as the teacher.")
