"""Whether what is to be saved is there already, to the last number: then nothing needs to be written."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import WanConfig
from ..errors import WanLiteError
from ..files import read_json
from .card import StudentCard, read_metadata
from .container import read_header
from .keymap import wan_shapes
from .lora import Lora, read_lora
from .pairs import PLAIN, rounded
from .read import open_wan
from .saving import provenance


def same_student(path: Path, *, config: WanConfig, card: StudentCard | None, dtype: str, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> bool:
    """Whether the file or folder is this very student in this dtype. tensors: all of the student's, asked for where all else is the same."""
    try:
        with open_wan(path) as there:
            if wan_shapes(there.config) != wan_shapes(config) or there.provenance != _as_read(provenance(card)):
                return False
            if any(place.packed or place.dtype != PLAIN[dtype] for place in there.places.values()) if dtype in PLAIN else not there.packed:
                return False
            return all(torch.equal(there.tensor(name), rounded(dtype, name, tensor).to(there.places[name].dtype)) for name, tensor in tensors())
    except (OSError, WanLiteError):
        return False


def same_lora(path: Path, lora: Lora, *, config: WanConfig, card: StudentCard | None, dtype: torch.dtype) -> bool:
    """Whether the file is this very LoRA in this dtype."""
    try:
        if read_metadata(read_header(path).metadata) != _as_read(card.to_json() if card else {"lora": True}):
            return False
        there = read_lora(path, config)
    except (OSError, WanLiteError):
        return False
    if there.factors.keys() != lora.factors.keys() or there.diffs.keys() != lora.diffs.keys():
        return False
    pairs = [(there.factors[name], lora.factors[name]) for name in lora.factors]
    return (all(math.isclose(one.scale, other.scale, rel_tol=1e-6) and torch.equal(one.down, other.down.to(dtype)) and torch.equal(one.up, other.up.to(dtype))
                and one.down.dtype == dtype for one, other in pairs)
            and all(torch.equal(there.diffs[name], diff.to(there.diffs[name].dtype)) for name, diff in lora.diffs.items()))


def same_beside(files: Mapping[Path, bytes | None], texts: Mapping[Path, Any]) -> bool:
    """Whether what goes with a student is there too: each file with these bytes, each JSON text with this value (None: there is none of it)."""
    try:
        return (all((file.read_bytes() if file.exists() else None) == content for file, content in files.items())
                and all((read_json(file) if file.exists() else None) == _as_read(value) for file, value in texts.items()))
    except (OSError, ValueError):
        return False


def _as_read(said: Mapping[str, Any]) -> Any:
    """As it comes back from a header or a config."""
    return json.loads(json.dumps(said))
