"""JSON with values that it should not have, and text that is no JSON."""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from .mutation import spoils
from .originals import DICTS, INDEX, Place

FOLDERS = ("student", "shards", "diffusers", "run", "start")
VALUES, TEXT = "JSON of wrong values", "JSON that is none"
DIGITS = "@digits@"             # stands for a number longer than Python reads
NAN, INFINITY = float("nan"), float("inf")
BAD = (NAN, INFINITY, -INFINITY, -1, 0, 1, 2**31, 2**63, 10**400, -10**400, 10**4000, 1e308, 0.5, 128.0, 127, "", "128", "none", "x" * 100_000, "\ud800",
       "\0", "a\nb",
       "../../x", None, True, False, [], {}, [1] * 1000, [None], [NAN], [[]], {"a": {"b": []}}, {"": None}, json.loads("[" * 400 + "]" * 400))


def some_json(draw: Random, place: Place) -> Path:
    return draw.choice([path for path in place.files(".json") if path.name != INDEX and not path.name.endswith("workflow.json")])


def bad_value(draw: Random, place: Place) -> Any:
    return draw.choice(BAD if place.kind in DICTS else (*BAD, DIGITS))


def put(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value).replace(f'"{DIGITS}"', "9" * 5000), encoding="utf-8")


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """(dict or list, key) of everything in it, nested or not."""
    for key in range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ():
        yield value, key
        yield from spots(value[key])


@spoils(VALUES, *FOLDERS, *DICTS)
def a_value(draw: Random, place: Place) -> None:
    path = some_json(draw, place)
    fields = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(draw.choice((1, 1, 1, 3))):
        inside, key = draw.choice(list(spots(fields)))
        inside[key] = bad_value(draw, place)
    put(path, fields)


@spoils(VALUES, *FOLDERS, *DICTS)
def a_value_of_the_first_level(draw: Random, place: Place) -> None:
    path = some_json(draw, place)
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields[draw.choice(list(fields))] = bad_value(draw, place)
    put(path, fields)


@spoils(VALUES, *FOLDERS, *DICTS)
def a_number_and_its_other_names(draw: Random, place: Place) -> None:
    """One value for all that had the same number."""
    path = some_json(draw, place)
    fields = json.loads(path.read_text(encoding="utf-8"))
    numbers = [(inside, key) for inside, key in spots(fields) if type(inside[key]) in (int, float)]
    inside, key = draw.choice(numbers)
    old, new = inside[key], draw.choice((bad_value(draw, place), float(inside[key]), str(inside[key]), inside[key] + 1, inside[key] * 2**40))
    for inside, key in numbers:
        if inside[key] == old:
            inside[key] = new
    put(path, fields)


@spoils(VALUES, *FOLDERS, *DICTS)
def a_name_gone_renamed_or_added(draw: Random, place: Place) -> None:
    path = some_json(draw, place)
    fields = json.loads(path.read_text(encoding="utf-8"))
    inside, key = draw.choice([(inside, key) for inside, key in spots(fields) if isinstance(inside, dict)])
    value, how = inside[key], draw.randrange(3)
    if how < 2:
        del inside[key]
    if how > 0:
        new = draw.choice((f"{key}_", key.upper(), "", "\ud800", "k" * 10_000, "_class_name", "image_dim", "projection_factor"))
        inside[new] = draw.choice((value, bad_value(draw, place)))
    put(path, fields)


@spoils(VALUES, *FOLDERS, *DICTS)
def no_fields_at_all(draw: Random, place: Place) -> None:
    put(some_json(draw, place), bad_value(draw, place) if draw.random() < 0.8 else {})


@spoils(TEXT, *FOLDERS)
def cut_text(draw: Random, place: Place) -> None:
    path = some_json(draw, place)
    os.truncate(path, draw.choice((0, 1, draw.randrange(path.stat().st_size))))


@spoils(TEXT, *FOLDERS)
def bits_of_text(draw: Random, place: Place) -> None:
    path = some_json(draw, place)
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 4))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@spoils(TEXT, *FOLDERS)
def another_encoding(draw: Random, place: Place) -> None:
    path = some_json(draw, place)
    text = path.read_text(encoding="utf-8")
    path.write_bytes(draw.choice((text.encode("utf-16"), text.encode("utf-8-sig"), b"\xff" + text.encode(), text.replace("t", "ä").encode("latin-1"),
                                  b"\x80\x04.")))


@spoils(TEXT, *FOLDERS)
def nested_text(draw: Random, place: Place) -> None:
    depth, (opening, closing) = draw.choice((900, 5000, 200_000)), draw.choice((("[", "]"), ('{"a":', "}")))
    some_json(draw, place).write_text('{"num_layers": ' + opening * depth + ("1" if opening != "[" else "") + closing * depth + "}", encoding="utf-8")


@spoils(TEXT, *FOLDERS)
def names_twice(draw: Random, place: Place) -> None:
    path = some_json(draw, place)
    fields = json.loads(path.read_text(encoding="utf-8"))
    key = draw.choice(list(fields))
    path.write_text(json.dumps({key: draw.choice((fields[key], 1, None))})[:-1] + ", " + json.dumps(fields)[1:], encoding="utf-8")


@spoils(TEXT, *FOLDERS)
def text_of_a_gigabyte(draw: Random, place: Place) -> None:
    """A hole: it takes no room on the disk."""
    os.truncate(some_json(draw, place), draw.choice((2**30, 2**40)))
