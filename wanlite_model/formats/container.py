"""The safetensors container: a header that is checked before anything is believed, and a writer that holds one tensor at a time.

Reading copies instead of mapping: a mapped file can be neither renamed nor removed on Windows, and a student read from a folder
must be able to replace it. Layout: 8 bytes (header length), a JSON header padded with spaces, then the tensors without gaps.
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import WanLiteError
from ..files import regular

MAX_HEADER = 100_000_000                # bytes; what the safetensors library itself allows
MAX_AXES = 16                           # torch itself allows 64, no model has more than 5
CHUNK = 2**20                           # elements converted and checked at once: 4 MiB of fp32
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
REPAIR = "Download or copy the file again."


class Entry(NamedTuple):
    """One tensor of a file: `start` and `end` are bytes from the beginning of the file."""
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    metadata: dict[str, str]
    entries: dict[str, Entry]


def read_header(path: Path) -> Header:
    """The names, shapes and places of a file's tensors. Raises WanLiteError when the file is not whole."""
    try:
        size = regular(path).stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise _broken(path, f"it has {size} bytes and its first 8 announce a header of {length}")
            text = file.read(length)
    except OSError as error:
        raise _broken(path, f"it cannot be read ({error.strerror or error})") from error
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        metadata = fields.pop("__metadata__", {})
        entries = {name: _entry(fields[name], 8 + length) for name in fields}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _broken(path, f"its header cannot be read ({error})") from error
    _check_places(path, entries, 8 + length, size)
    return Header(metadata=metadata, entries=entries)


def read_tensor(file: BinaryIO, entry: Entry) -> Tensor:
    """One tensor of an open file, in memory of its own."""
    data = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    file.seek(entry.start)
    if file.readinto(memoryview(data.numpy())) != len(data):
        raise WanLiteError(f"{Path(file.name).name} became shorter while it was read.", "", REPAIR)
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)


class Writer:
    """Streams tensors of announced shapes, in any order, into a new file.

    Their dtypes may be known only when they come, so the header is written last, into room kept for it at the front.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> None:
        self.shapes, self.metadata, self.entries = dict(shapes), dict(metadata), {}
        widest = 8 * sum(math.prod(shape) for shape in shapes.values())
        longest = {name: Entry(max(DTYPES, key=len), shape, widest, widest) for name, shape in shapes.items()}
        self.start = self.end = 8 + (len(self._header(longest, 0)) + 7) // 8 * 8
        self.held: list[tuple[str, Tensor]] = []
        self.file = path.open("xb")
        self.file.seek(self.start)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        """Adds one tensor, as `dtype` or as it is. Raises WanLiteError on an unknown name, another shape or a value that is not finite."""
        if name in self.entries or self.shapes.get(name) != tuple(tensor.shape):
            expected = self.shapes.get(name)
            told = "written twice" if name in self.entries else f"expected with shape {list(expected)}" if expected is not None else "not a tensor of this WAN"
            raise WanLiteError(f"{name!r} of shape {list(tensor.shape)} is {told}.")
        dtype = dtype or tensor.dtype
        if (tensor.numel() * dtype.itemsize) % 8:       # would put a wider tensor after it off its alignment: see finish
            self.held.append((name, checked(name, tensor.detach().reshape(-1), dtype)))
            self.entries[name] = Entry("", (), 0, 0)
            return
        size = 0
        for chunk in tensor.detach().reshape(-1).split(CHUNK):
            size += self.file.write(memoryview(checked(name, chunk, dtype).view(torch.uint8).numpy()))
        self._place(name, dtype, size)

    def finish(self) -> int:
        """Writes what was held back and the header, and waits for the disk. Returns the bytes of all tensors."""
        for name, values in sorted(self.held, key=lambda held: -held[1].dtype.itemsize):
            self._place(name, values.dtype, self.file.write(memoryview(values.view(torch.uint8).numpy())))
        missing = [name for name in self.shapes if name not in self.entries]
        if missing:
            raise WanLiteError(f"{missing[0]!r} was never given, and {len(missing) - 1} others.",
                               f"This WAN has {len(self.shapes)} tensors.")
        header = self._header(self.entries, self.start).ljust(self.start - 8)
        self.file.seek(0)
        self.file.write(len(header).to_bytes(8, "little") + header)
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.end - self.start

    def _place(self, name: str, dtype: torch.dtype, size: int) -> None:
        self.entries[name] = Entry(NAMES[dtype], self.shapes[name], self.end, self.end + size)
        self.end += size

    def _header(self, entries: Mapping[str, Entry], start: int) -> bytes:
        tensors = {name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start - start, e.end - start]}
                   for name, e in entries.items()}
        return json.dumps({"__metadata__": self.metadata, **tensors}, separators=(",", ":")).encode("utf-8")


def checked(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` [n] on the CPU in `dtype`. Raises WanLiteError unless all are finite there."""
    converted = values.to(device="cpu", dtype=dtype)
    if not _finite(converted):
        if _finite(values):
            raise WanLiteError(f"{name!r} reaches {float(values.abs().max()):.4g}, which {str(dtype)[6:]} cannot hold.", "",
                               "Save as bfloat16 or float32.")
        raise WanLiteError(f"{name!r} holds a value that is not finite.", "Every weight of a WAN is a number.",
                           "Go back to an earlier checkpoint, and train on with a lower learning rate.")
    return converted.contiguous()


def _finite(values: Tensor) -> bool:
    return bool((values.float() if values.dtype.itemsize == 1 else values).isfinite().all())        # torch cannot tell of float8 as it is


def _entry(fields: Mapping[str, Any], start: int) -> Entry:
    begin, end = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if len(shape) > MAX_AXES or not all(type(number) is int and 0 <= number < 2**63 for number in (begin, end, *shape)) or not isinstance(fields["dtype"], str):
        raise ValueError("a shape or an offset that no tensor has")
    return Entry(fields["dtype"], shape, start + begin, start + end)


def _check_places(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """The tensors fill the file from the header to its end, without gap or overlap, each as long as its shape says."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        length = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else entry.end - entry.start
        if entry.start != end or entry.end - entry.start != length:
            raise _broken(path, f"{name!r} does not lie where its shape says")
        end = entry.end
    if end != size:
        raise _broken(path, f"its header describes {end} bytes and there are {size}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name that stands twice")
    return fields


def _broken(path: Path, why: str) -> WanLiteError:
    return WanLiteError(f"{path.name} is not a whole safetensors file: {why}.", "", REPAIR)
