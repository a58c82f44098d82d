"""Frozen values hold what their fields say: whoever is given one that was read from JSON need not look again."""
from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from .errors import WanLiteError

KINDS = {"int": (int, "a whole number"), "float": ((int, float), "a number"), "str": (str, "text"), "bool": (bool, "true or false")}
LARGEST = 1e300             # JSON's whole numbers have no end, those that are calculated with have


def check_kinds(value: Any) -> None:
    """Raises WanLiteError unless each field of the dataclass holds what its annotation says: an int, a float (finite), a str, a bool, a tuple of these, or one
    of them or None. Others are passed over.
    """
    for field in fields(value):
        given, kind = getattr(value, field.name), field.type.removesuffix(" | None")
        if given is None and kind != field.type:
            continue
        inner = re.fullmatch(r"tuple\[(\w+)(, \.\.\.|(?:, \1)*)\]", kind)
        if inner:
            count = None if "..." in inner[2] else 1 + inner[2].count(",")
            right = isinstance(given, tuple) and count in (None, len(given)) and all(_is(item, inner[1]) for item in given)
            told = f"{'a list' if count is None else count} of {KINDS[inner[1]][1]} each"
        elif kind in KINDS:
            right, told = _is(given, kind), KINDS[kind][1]
        else:
            continue
        if not right:
            raise WanLiteError(f"{field.name} is {given!r}.", f"It must be {told}.")


def _is(given: Any, kind: str) -> bool:
    types = KINDS[kind][0]
    return isinstance(given, types) and isinstance(given, bool) == (kind == "bool") and (kind not in ("int", "float") or -LARGEST < given < LARGEST)
