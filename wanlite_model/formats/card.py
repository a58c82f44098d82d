"""What a saved student says about itself: how to sample it, where it comes from, what was measured."""
from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import WanLiteError

PREFIX = "wanlite."                     # of our keys in a file's header; a key `config` would break newer ComfyUIs


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentCard:
    """Recommended settings and provenance. It travels with the weights, so it has no room for a path, a user's name or a prompt.

    shift: of ModelSamplingSD3 (8.0 is what ComfyUI gives a WAN when nobody sets one). size: width, height in pixels and frames.
    teacher: its architecture in words. teacher_fingerprint: hexadecimal. keep: the teacher's block behind each of ours.
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
    recipe: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("size", "keep"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        whole = {"steps": self.steps, "ffn_dim": self.ffn_dim, **{f"size[{i}]": n for i, n in enumerate(self.size)},
                 **{f"keep[{i}]": n for i, n in enumerate(self.keep)}}
        wrong = [name for name, value in whole.items() if type(value) is not int or value < 0]
        wrong += [name for name in ("sampler", "scheduler") if not re.fullmatch(r"\w+", getattr(self, name))]
        wrong += ["teacher"] * bool(re.search(r"[/\\\n]", self.teacher))
        wrong += ["teacher_fingerprint"] * (not re.fullmatch(r"[0-9a-f]*", self.teacher_fingerprint))
        numbers = {"cfg": self.cfg, "shift": self.shift, **self.recipe, **self.measured}
        wrong += [name for name, value in numbers.items() if not isinstance(value, (int, float)) or not math.isfinite(value)]
        if wrong or self.steps < 1 or len(self.size) != 3:
            raise WanLiteError(f"The student's card has a wrong {wrong[0] if wrong else 'steps or size'}.",
                               "It holds numbers, a sampler's and a scheduler's name, and the teacher's architecture in words.")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "recipe": dict(self.recipe), "measured": dict(self.measured)}

    def to_metadata(self) -> dict[str, str]:
        """The header's form: {"wanlite.steps": "4", ...}."""
        return {PREFIX + key: json.dumps(value) for key, value in self.to_json().items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StudentCard | None:
        """The card among `values`; other keys are passed over, and without a number of steps there is no card."""
        if "steps" not in values:
            return None
        try:
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        except (TypeError, AttributeError) as error:
            raise WanLiteError(f"The student's card cannot be read ({error}).") from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> StudentCard | None:
        return cls.from_json(read_metadata(metadata))


def read_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What "wanlite.*" keys of a header say; a value that is not JSON is passed over, since anyone may write a header."""
    found = {}
    for key, value in metadata.items():
        if key.startswith(PREFIX):
            try:
                found[key.removeprefix(PREFIX)] = json.loads(value)
            except ValueError:
                continue
    return found
