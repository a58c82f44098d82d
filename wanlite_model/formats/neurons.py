"""Which of the teacher's FFN neurons a narrowed student kept, as text for a file's header: one bit a neuron, 2.3 KB a block of 14B."""
from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import WanLiteError


def to_mask(kept: Sequence[int], total: int) -> str:
    """The numbers `kept` of `total` neurons as a bit each, the first neuron in the lowest; from_mask reads it back."""
    bits = np.zeros(total, dtype=np.uint8)
    bits[list(kept)] = 1
    return base64.urlsafe_b64encode(np.packbits(bits, bitorder="little").tobytes()).decode("ascii")      # no slash: nothing that looks like a path


def from_mask(mask: Any) -> tuple[int, ...]:
    """The numbers of the kept neurons, rising. Raises WanLiteError on what to_mask does not write."""
    try:
        if not isinstance(mask, str) or not re.fullmatch(r"[\w-]*={0,2}", mask, re.ASCII):
            raise ValueError("it is no text of that kind")
        bits = np.unpackbits(np.frombuffer(base64.urlsafe_b64decode(mask), dtype=np.uint8), bitorder="little")
    except (ValueError, binascii.Error) as error:
        raise WanLiteError(f"A note of the FFN neurons that a block kept cannot be read ({error}).") from error
    return tuple(np.flatnonzero(bits).tolist())
