"""WANs kept in fewer bits: scales and marks that are wrong, and GGUF files with headers that lie."""
from __future__ import annotations

import json
import os
import struct
from random import Random

import gguf
import torch
from safetensors.torch import save_file

from .containers import FAR, parsed, put
from .mutation import spoils
from .originals import GGUF, PACKED, Place
from .tensors import loaded
from .texts import BAD

SCALES, GGUFS = "scales and marks of fewer bits", "GGUF files"
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "nvfp4", "mxfp8", "", None, 5, [], {})
HEADER = 24                             # bytes: magic, version, how many tensors, how many fields


@spoils(SCALES, *PACKED)
def a_scale_that_is_none(draw: Random, place: Place) -> None:
    tensors, metadata = loaded(place.path)
    name = draw.choice([name for name in tensors if name.endswith(("scale", "scale_weight"))])
    scale = tensors[name]
    rows = tensors[name.replace(".weight_scale", ".weight").replace(".scale_weight", ".weight")].shape[0]
    new = draw.choice((None, scale.reshape(1), scale.reshape(1, 1), scale.half(), scale.double(), scale.to(torch.float8_e4m3fn), torch.tensor(1),
                       torch.tensor(True), torch.ones(3),
                       torch.ones(0), torch.ones(rows), torch.ones(rows, 1), torch.ones(1, rows), torch.ones(rows, 4), torch.tensor(float("nan")),
                       torch.tensor(1e38)))
    if new is None:
        del tensors[name]
    else:
        tensors[name] = new
    save_file({name: value.contiguous() for name, value in tensors.items()}, place.path, metadata)


@spoils(SCALES, "marked")
def a_mark_that_is_none(draw: Random, place: Place) -> None:
    tensors, metadata = loaded(place.path)
    name = draw.choice([name for name in tensors if name.endswith(".comfy_quant")])
    text = draw.choice((b"", b"{", b"\xff\xfe", b"[" * 60_000, b"[" * 100_000, b"9" * 5000, *(json.dumps({"format": told}).encode() for told in FORMATS),
                        *(json.dumps(value).encode() for value in BAD if not isinstance(value, str)),
                        *(json.dumps({"format": "int8_tensorwise", "params": value}).encode() for value in ([], None, {"convrot": True}, "convrot"))))
    mark = torch.tensor(list(text), dtype=torch.uint8)
    tensors[name] = draw.choice((mark, mark, mark, mark[None], mark.float(), torch.zeros((), dtype=torch.uint8)))
    save_file(tensors, place.path, metadata)


@spoils(SCALES, *PACKED)
def a_header_that_names_other_formats(draw: Random, place: Place) -> None:
    header, data = parsed(place.path)
    layer = draw.choice(("blocks.0.ffn.0", "blocks.1.ffn.0", "head.head", "nowhere", "", "patch_embedding", "head"))
    layers = draw.choice(({layer: {"format": draw.choice(FORMATS)}}, {layer: draw.choice(BAD)}, draw.choice(BAD),
                          {layer: {"format": "float8_e4m3fn", "params": 3}}))
    header["__metadata__"]["_quantization_metadata"] = draw.choice((json.dumps({"layers": layers}), json.dumps(layers), "", "[" * 100_000, "9" * 5000, "null"))
    put(place.path, header, data)


@spoils(SCALES, *PACKED)
def marks_gone(draw: Random, place: Place) -> None:
    tensors, metadata = loaded(place.path)
    marks = [name for name in tensors if name.endswith(".comfy_quant") or name == "scaled_fp8"]
    for name in draw.sample(marks, draw.choice((1, len(marks)))):
        del tensors[name]
    if draw.random() < 0.5:
        metadata.pop("_quantization_metadata", None)
    save_file(tensors, place.path, metadata)


@spoils(GGUFS, GGUF)
def a_gguf_cut_or_longer(draw: Random, place: Place) -> None:
    size = place.path.stat().st_size
    os.truncate(place.path, draw.choice((0, 1, 4, 8, 23, HEADER, draw.randrange(5000), draw.randrange(size), size - 1, size + 100)))


@spoils(GGUFS, GGUF)
def bits_of_a_gguf(draw: Random, place: Place) -> None:
    data = bytearray(place.path.read_bytes())
    end = draw.choice((HEADER, 200, 5000, len(data)))
    for _ in range(draw.choice((1, 2, 16))):
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    place.path.write_bytes(data)


@spoils(GGUFS, GGUF)
def counts_of_a_gguf(draw: Random, place: Place) -> None:
    data = place.path.read_bytes()
    old = struct.unpack_from("<QQ", data, 8)
    new = [draw.choice((value, value + 1, value - 1, 0, *(far for far in FAR if far < 2**64))) for value in old]
    place.path.write_bytes(data[:8] + struct.pack("<QQ", *new) + data[HEADER:])


def _text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


@spoils(GGUFS, GGUF)
def a_field_of_a_gguf(draw: Random, place: Place) -> None:
    """Before the others: of a type or a length that is none, or one that the reader believes."""
    data = place.path.read_bytes()
    shape = "comfy.gguf.orig_shape.blocks.0.ffn.0.weight"
    far = struct.pack("<Q", draw.choice((2**20, 2**40, 2**63, 2**64 - 1)))
    field = draw.choice((
        _text("a") + struct.pack("<I", draw.choice((13, 99, 2**32 - 1))), _text("a") + struct.pack("<I", 8) + far, far + b"a",
        _text("a") + struct.pack("<II", 9, draw.choice((0, 4, 7, 8, 12))) + far, _text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000,
        _text("general.alignment") + struct.pack("<II", 4, draw.choice((0, 1, 3, 2**31))), _text("general.alignment") + struct.pack("<IQ", 10, 32),
        _text(b"\xff") + struct.pack("<IB", 0, 1),
        _text("general.architecture") + struct.pack("<I", 8) + _text("wan"),
        *(_text(shape) + struct.pack("<IIQ", 9, 5, len(sides)) + struct.pack(f"<{len(sides)}i", *sides) for sides in ((), (128, 128), (-128, -128), (16384,),
                                                                                                                      (3,), (0, 5))),
        _text(shape) + struct.pack("<I", 8) + _text("128"), _text(shape) + struct.pack("<IIQff", 9, 6, 2, 128.0, float("nan"))))
    counts = struct.unpack_from("<QQ", data, 8)
    place.path.write_bytes(data[:8] + struct.pack("<QQ", counts[0], counts[1] + 1) + field + data[HEADER:])


@spoils(GGUFS, GGUF)
def a_tensor_of_a_gguf(draw: Random, place: Place) -> None:
    """Its name, its shape, its type or its place, where the header tells them."""
    reader = gguf.GGUFReader(place.path)
    tensor = draw.choice(reader.tensors)
    data, start = bytearray(place.path.read_bytes()), tensor.field.offset
    dims = start + 8 + len(tensor.name)
    kind = dims + 4 + 8 * len(tensor.shape)
    where, form, new = draw.choice((
        (start, "<Q", draw.choice((0, 1, 2**40, 2**64 - 1))), (start + 8, "<B", draw.choice((0, 0xff, 0x41))),
        (dims, "<I", draw.choice((0, 1, 3, 5, 200, 2**31))),
        (dims + 4, "<Q", draw.choice((0, 1, 64, 129, 2**40, 2**63, 2**64 - 1))), (kind, "<I", draw.choice((0, 1, 2, 8, 12, 24, 30, 31, 99, 2**32 - 1))),
        (kind + 4, "<Q", draw.choice((0, 1, 32, 2**40, 2**63, 2**64 - 32)))))
    struct.pack_into(form, data, where, new)
    place.path.write_bytes(data)
