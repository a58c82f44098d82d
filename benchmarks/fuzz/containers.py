"""Safetensors files cut, flipped, and with headers that lie."""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from .mutation import spoils
from .originals import PACKED, WANS, Place

CONTAINERS = (*WANS, *PACKED, "lora", "bank", "run", "start")
CUT, BITS, LIES = "files cut or too long", "flipped bits", "headers that lie"
FAR = (2**31, 2**40, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 10**400)
DTYPES = ("F4", "F6_E2M3", "F8_E8M0", "F8_E4M3", "C64", "U64", "I64", "BOOL", "F64", "XX", "", "f32", "\ud800", 5, None, [])


def some_file(draw: Random, place: Place) -> Path:
    return draw.choice(place.files(".safetensors"))


def parsed(path: Path) -> tuple[dict[str, Any], bytes]:
    """(the header's fields, the bytes of all tensors)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + length]), data[8 + length:]


def put(path: Path, header: dict[str, Any] | str, data: bytes, length: int | None = None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def rewritten(draw: Random, place: Place, change: Callable[[dict[str, Any], dict[str, Any], str], None]) -> None:
    """Calls change(header, the entry of one tensor, its name), and writes the file with what came of it."""
    path = some_file(draw, place)
    header, data = parsed(path)
    name = draw.choice([name for name in header if name != "__metadata__"])
    change(header, header[name], name)
    put(path, header, data)


@spoils(CUT, *CONTAINERS)
def cut_somewhere(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    os.truncate(path, draw.randrange(path.stat().st_size))


@spoils(CUT, *CONTAINERS)
def cut_in_its_header(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    os.truncate(path, draw.randrange(8 + length))


@spoils(CUT, *CONTAINERS)
def cut_at_an_end(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    os.truncate(path, draw.choice((0, 1, 7, 8, 9, path.stat().st_size - 1)))


@spoils(CUT, *CONTAINERS)
def longer_than_it_says(draw: Random, place: Place) -> None:
    with some_file(draw, place).open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 8, 4096))))


def _flip(draw: Random, path: Path, low: int, high: int, count: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[draw.randrange(low, high)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@spoils(BITS, *CONTAINERS)
def bits_of_the_header(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    _flip(draw, path, 8, 8 + header, draw.choice((1, 1, 2, 8)))


@spoils(BITS, *CONTAINERS)
def bits_of_the_length(draw: Random, place: Place) -> None:
    _flip(draw, some_file(draw, place), 0, 8, draw.choice((1, 2, 8)))


@spoils(BITS, *CONTAINERS)
def bits_of_the_tensors(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    data = path.read_bytes()
    _flip(draw, path, 8 + int.from_bytes(data[:8], "little"), len(data), draw.choice((1, 16, 1024)))


@spoils(BITS, *CONTAINERS)
def nothing_but_noise(draw: Random, place: Place) -> None:
    some_file(draw, place).write_bytes(draw.randbytes(draw.choice((8, 9, 100, 5000))))


@spoils(LIES, *CONTAINERS)
def a_length_that_is_not_its_own(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header, data = parsed(path)
    size = path.stat().st_size
    put(path, header, data, draw.choice((0, 1, 2, size - 9, size - 8, size - 7, size, 99_999_999, 10**8, 2**31, 2**62, 2**63, 2**64 - 1)))


@spoils(LIES, *CONTAINERS)
def a_length_of_a_hundred_megabytes(draw: Random, place: Place) -> None:
    """All of it there, and nearly all of it zeros, or spaces after an honest header."""
    path = some_file(draw, place)
    header, data = parsed(path)
    if draw.random() < 0.5:
        put(path, header, b"", 95_000_000)
        os.truncate(path, 95_000_008 + len(data))
    else:
        put(path, json.dumps(header) + " " * draw.choice((1, 8, 1_000_000)), data)
        place.same = True


@spoils(LIES, *CONTAINERS)
def many_names(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header, data = parsed(path)
    start = draw.choice(("x", "blocks.{}.x", "diffusion_model.{}", "{}"))
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    for i in range(draw.choice((1000, 40_000))):
        header[start.format(i) if "{}" in start else f"{start}{i}"] = {"dtype": "BF16", "shape": [0], "data_offsets": [end, end]}
    put(path, header, data)


@spoils(LIES, *CONTAINERS)
def deeply_nested(draw: Random, place: Place) -> None:
    depth = draw.choice((50, 900, 5000, 200_000))
    path, opening, closing = some_file(draw, place), *draw.choice((("[", "]"), ('{"a":', "}")))
    header, data = parsed(path)
    nested = opening * depth + ("1" if opening != "[" else "") + closing * draw.choice((0, depth))
    name = draw.choice(list(header))
    put(path, json.dumps({**header, name: "@"}).replace('"@"', nested, 1), data)


@spoils(LIES, *CONTAINERS)
def a_name_twice(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header, data = parsed(path)
    name = draw.choice(list(header))
    again = json.dumps({name: header[draw.choice((name, draw.choice(list(header))))]})
    put(path, json.dumps(header)[:-1] + ", " + again[1:], data)


@spoils(LIES, *CONTAINERS)
def places_that_overlap_or_leave_gaps(draw: Random, place: Place) -> None:
    def change(header: dict[str, Any], entry: dict[str, Any], name: str) -> None:
        begin, end = entry["data_offsets"]
        other = draw.choice([other for other in header if other != "__metadata__"])
        entry["data_offsets"] = draw.choice((
            [begin - 1, end - 1], [begin + 2, end + 2], [end, begin], [-begin, end], [begin, end + 2], [begin, begin], [0, end - begin],
            header[other]["data_offsets"] if other != name else [end, end], [begin, draw.choice(FAR)], [draw.choice(FAR), draw.choice(FAR)]))
    rewritten(draw, place, change)


@spoils(LIES, *CONTAINERS)
def places_that_are_none(draw: Random, place: Place) -> None:
    def change(header: dict[str, Any], entry: dict[str, Any], _: str) -> None:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(([begin], [begin, end, end], [float(begin), end], [True, end], [str(begin), end], [None, end], {}, "ab", None, 3,
                                             [float("nan"), float("inf")]))
        if draw.random() < 0.2:
            del entry[draw.choice(("dtype", "shape", "data_offsets"))]
    rewritten(draw, place, change)


@spoils(LIES, *CONTAINERS)
def a_shape_that_is_none(draw: Random, place: Place) -> None:
    def change(header: dict[str, Any], entry: dict[str, Any], _: str) -> None:
        shape = entry["shape"]
        entry["shape"] = draw.choice((
            [*shape, draw.choice(FAR)], [0, *FAR[-3:]], [*shape, 0], [-side for side in shape], [float(side) for side in shape], [True, *shape], ["2"], None, 7,
            {"a": 1}, [shape], [2] * 300_000, [1] * 300_000, [*shape, *[1] * 100], [*shape, float("nan")]))
    rewritten(draw, place, change)


@spoils(LIES, *CONTAINERS)
def a_dtype_that_is_another_or_none(draw: Random, place: Place) -> None:
    def change(header: dict[str, Any], entry: dict[str, Any], _: str) -> None:
        entry["dtype"] = draw.choice(DTYPES)
        if draw.random() < 0.5:             # so that its length is right for eight bits
            begin, end = entry["data_offsets"]
            entry["shape"] = [end - begin]
    rewritten(draw, place, change)


@spoils(LIES, *CONTAINERS)
def a_tensor_of_a_terabyte(draw: Random, place: Place) -> None:
    """The file has a hole of that size, so that the header does not lie about it."""
    path = some_file(draw, place)
    header, data = parsed(path)
    rows = draw.choice((2**18, 2**20, 2**27))
    name = draw.choice(("blocks.7.ffn.0.weight", "weight", max(header, key=lambda name: header[name].get("data_offsets", [0, 0])[1])))
    old = header.get(name, {"dtype": "BF16", "data_offsets": [len(data), len(data)]})
    begin, (columns, width) = old["data_offsets"][0], ((old.get("shape") or [4096])[-1], 4 if old["dtype"] == "F32" else 2)
    end = begin + rows * columns * width
    put(path, {**header, name: {"dtype": old["dtype"], "shape": [rows, columns], "data_offsets": [begin, end]}}, data)
    os.truncate(path, path.stat().st_size - len(data) + end)


@spoils(LIES, *CONTAINERS)
def metadata_that_is_no_text(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header, data = parsed(path)
    header["__metadata__"] = draw.choice((None, 3, [], ["a"], "a", {"format": 1}, {"format": None}, {"format": {"a": []}}, {"wanlite.steps": 4}))
    put(path, header, data)
