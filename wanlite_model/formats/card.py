"""What a saved student says about itself: how to sample it, where it comes from, what was measured."""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import WanLiteError
from ..kinds import LARGEST
from ..roles import SIDES
from .neurons import from_mask

PREFIX = "wanlite."                     # of our keys in a file's header; a key `config` would break newer ComfyUIs


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentCard:
    """Recommended settings and provenance. It travels with the weights, so it has no room for a path, a user's name or a prompt.

    shift: of ModelSamplingSD3 (8.0 is what ComfyUI gives a WAN when nobody sets one). size: width, height in pixels and frames.
    teacher: its architecture in words. teacher_fingerprint: hexadecimal. keep: the teacher's block behind each of ours.
    ffn_kept: of each block, which of the teacher's FFN neurons stayed (see neurons.py); empty where all did.
    expert, boundary: of one of 2.2's two, "high" or "low", and the sigma at which the low one takes over; empty and 0 for a whole WAN.
    recipe, measured: {name: number}. Raises WanLiteError on anything else.
    """
    sampler: str = "euler"
    scheduler: str = "simple"
    steps: int = 30
    cfg: float = 5.0
    shift: float = 8.0
    size: tuple[int, int, int] = (832, 480, 33)
    teacher: str = ""
    teacher_fingerprint: str = ""
    keep: tuple[int, ...] = ()
    ffn_dim: int = 0
    ffn_kept: tuple[str, ...] = ()
    expert: str = ""
    boundary: float = 0.0
    recipe: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("size", "keep", "ffn_kept"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        whole = {"steps": self.steps, "ffn_dim": self.ffn_dim, **{f"size[{i}]": n for i, n in enumerate(self.size)},
                 **{f"keep[{i}]": n for i, n in enumerate(self.keep)}}
        wrong = [name for name, value in whole.items() if type(value) is not int or not 0 <= value < 2**31]
        wrong += [name for name in ("sampler", "scheduler") if not re.fullmatch(r"\w+", getattr(self, name))]
        wrong += ["expert"] * (self.expert not in ("", *SIDES)) + ["boundary"] * ((0 < self.boundary < 1) != bool(self.expert))
        wrong += ["teacher"] * bool(re.search(r"[/\\\n]", self.teacher))
        wrong += ["teacher_fingerprint"] * (not re.fullmatch(r"[0-9a-f]*", self.teacher_fingerprint))
        wrong += ["ffn_kept"] * (not _are_masks(self.ffn_kept, len(self.keep), self.ffn_dim))
        numbers = [("cfg", self.cfg), ("shift", self.shift), ("boundary", self.boundary), *self.recipe.items(), *self.measured.items()]
        wrong += [name for name, value in numbers if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST < value < LARGEST]
        if wrong or self.steps < 1 or len(self.size) != 3:
            raise WanLiteError(f"The student's card has a wrong {wrong[0] if wrong else 'steps or size'}.",
                               "It holds numbers, a sampler's and a scheduler's name, and the teacher's architecture in words.")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "recipe": dict(self.recipe), "measured": dict(self.measured)}

    def to_metadata(self) -> dict[str, str]:
        return header(self.to_json())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StudentCard | None:
        """The card among `values`; other keys are passed over, and without a number of steps there is no card."""
        if "steps" not in values:
            return None
        try:
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        except (TypeError, AttributeError) as error:
            raise WanLiteError(f"The student's card cannot be read ({error}).") from error


def _are_masks(ffn_kept: tuple[Any, ...], blocks: int, ffn_dim: int) -> bool:
    """Whether it is nothing, or as many neurons of each block as it has."""
    try:
        return not ffn_kept or [len(from_mask(mask)) for mask in ffn_kept] == [ffn_dim] * blocks
    except WanLiteError:
        return False


def header(said: Mapping[str, Any]) -> dict[str, str]:
    """What is said as a file's header holds it, text under keys of ours: {"wanlite.steps": "4", ...}."""
    return {PREFIX + key: json.dumps(value) for key, value in said.items()}


def read_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What "wanlite.*" keys of a header say; a value that is not JSON is passed over, since anyone may write a header."""
    found = {}
    for key, value in metadata.items():
        if key.startswith(PREFIX):
            try:
                found[key.removeprefix(PREFIX)] = json.loads(value)
            except (ValueError, RecursionError):
                continue
    return found
