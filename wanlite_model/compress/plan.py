"""What is taken from a teacher: which blocks, and how many FFN neurons in each of them."""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..config import MOST, WanConfig
from ..errors import WanLiteError
from ..formats.neurons import from_mask
from ..kinds import check_kinds

Method = Literal["interleaved", "greedy", "spaced", "influence", "given"]
METHODS: tuple[Method, ...] = ("interleaved", "greedy", "spaced", "influence", "given")
Refit = Literal["none", "mean", "least squares"]
REFITS: tuple[Refit, ...] = ("none", "mean", "least squares")       # of the blocks after a gap, see gaps.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A stage of the compression at unit `done` of `total`. `note`: what was just found, in words; may be empty."""
    stage: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionPlan:
    """Student block j is teacher block keep[j]; every block keeps `ffn_dim` FFN neurons. `method`: how the blocks were chosen.

    ffn_kept: of each student block, which of the teacher's neurons they are (see formats/neurons.py); empty where all are, or nobody noted it.
    Raises WanLiteError on a plan that the teacher cannot fill.
    """
    keep: tuple[int, ...]
    ffn_dim: int
    method: Method
    teacher_layers: int
    teacher_ffn_dim: int
    ffn_kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise WanLiteError(f"The method is {self.method!r}.", f"WanLite knows {', '.join(METHODS)}.")
        check_kinds(self)
        if self.teacher_layers > MOST["num_layers"]:
            raise WanLiteError(f"The teacher is said to have {self.teacher_layers} blocks.", f"No WAN has more than {MOST['num_layers']}.")
        check_keep(self.keep, self.teacher_layers)
        check_ffn_dim(self.ffn_dim, self.teacher_ffn_dim)
        _check_kept(self)

    @property
    def prunes_nothing(self) -> bool:
        return len(self.keep) == self.teacher_layers and self.ffn_dim == self.teacher_ffn_dim

    @property
    def removed(self) -> tuple[int, ...]:
        """The teacher's blocks that the student does not have."""
        return tuple(sorted(set(range(self.teacher_layers)) - set(self.keep)))

    @property
    def after_gaps(self) -> tuple[int, ...]:
        """The student's blocks right before which the teacher has blocks that were removed."""
        return tuple(j for j, (before, block) in enumerate(zip((-1, *self.keep), self.keep)) if block > before + 1)

    def student_config(self, teacher: WanConfig) -> WanConfig:
        return teacher.resized(num_layers=len(self.keep), ffn_dim=self.ffn_dim)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "keep": list(self.keep), "ffn_kept": list(self.ffn_kept)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CompressionPlan:
        """Raises WanLiteError when the value is not one that to_json wrote."""
        names = [f.name for f in fields(cls)]
        if set(value) != set(names) or not all(isinstance(value[name], (list, tuple)) for name in ("keep", "ffn_kept")):
            raise WanLiteError(f"A compression plan has {', '.join(map(str, value)) or 'no fields'}.", f"It must have {', '.join(names)}.")
        return cls(**{**value, "keep": tuple(value["keep"]), "ffn_kept": tuple(value["ffn_kept"])})


def protected(num_layers: int, depth: int) -> frozenset[int]:
    """The blocks that stay whatever their score: the first and last two when at least 8 blocks are kept, the first and the last
    from 2 to 7, none below. So at least half of the student's blocks are always free to be chosen, except when it has 2 or 3.
    """
    ends = 2 if depth >= 8 else 1 if depth >= 2 else 0
    return frozenset((*range(ends), *range(num_layers - ends, num_layers)))


def interleaved(num_layers: int, depth: int) -> tuple[int, ...]:
    """`depth` of `num_layers` blocks, evenly spread between the protected ends. Raises WanLiteError unless 1 <= depth <= num_layers."""
    check_depth(depth, num_layers)
    ends = len(protected(num_layers, depth)) // 2
    inner, kept = num_layers - 2 * ends, depth - 2 * ends
    middle = (ends + (2 * i + 1) * inner // (2 * kept) for i in range(kept))
    return (*range(ends), *middle, *range(num_layers - ends, num_layers))


def parse_keep_map(text: str, num_layers: int | None = None) -> tuple[int, ...]:
    """"0-3,5,7-9" -> (0, 1, 2, 3, 5, 7, 8, 9). Raises WanLiteError on anything that does not name existing blocks, rising.

    num_layers: None where the teacher is not there yet; then what is wrong for every teacher is refused.
    """
    keep: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", part)
        if match is None:
            raise WanLiteError(f"The keep-map has {part.strip()!r} in it.", "It is a list of block numbers and ranges, like 0-3,5,7-9.",
                               f"The teacher's blocks are 0-{num_layers - 1}." if num_layers else "")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise WanLiteError(f"The keep-map has the range {first}-{last}.", "A range runs upwards.", f"Write {last}-{first}.")
        if num_layers is None and last >= MOST["num_layers"]:
            raise WanLiteError(f"The keep-map names block {last}.", f"No WAN has more than {MOST['num_layers']} blocks.")
        blocks = num_layers or MOST["num_layers"]
        check_keep((first, last) if last > first else (first,), blocks)       # before a range of a million is written out
        keep.extend(range(first, last + 1))
    check_keep(tuple(keep), blocks)
    return tuple(keep)


def check_depth(depth: int, num_layers: int) -> None:
    """Raises WanLiteError unless `depth` blocks can be kept of `num_layers`."""
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= num_layers:
        raise WanLiteError(f"depth is {depth!r}.", f"The teacher has {num_layers} blocks, and a student keeps between 1 and all of them.")


def check_ffn_dim(ffn_dim: int, teacher_ffn_dim: int) -> None:
    """Raises WanLiteError unless `ffn_dim` neurons can be kept of the teacher's."""
    if isinstance(ffn_dim, bool) or not isinstance(ffn_dim, int) or not 1 <= ffn_dim <= teacher_ffn_dim:
        raise WanLiteError(f"ffn_dim is {ffn_dim!r}.",
                           f"The teacher's blocks have {teacher_ffn_dim} FFN neurons, and a student keeps between 1 and all of them.")


def check_keep(keep: tuple[int, ...], num_layers: int) -> None:
    """Raises WanLiteError unless `keep` names blocks of the teacher, each once, in their order."""
    if not keep:
        raise WanLiteError("The keep-map is empty.", "A student keeps at least one block.")
    strange = [block for block in keep if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < num_layers]
    if strange:
        raise WanLiteError(f"The keep-map names block {strange[0]!r}.", f"The teacher's {num_layers} blocks are 0-{num_layers - 1}.")
    for before, after in zip(keep, keep[1:]):
        if after <= before:
            raise WanLiteError(f"The keep-map has block {after} after block {before}.",
                               "Blocks keep the teacher's order, each once.", f"Write {before} and {after} in rising order, once.")


def _check_kept(plan: CompressionPlan) -> None:
    """Raises WanLiteError unless it names as many of the teacher's neurons as each block keeps, or none."""
    named = [from_mask(mask) for mask in plan.ffn_kept]
    if named and ([len(neurons) for neurons in named] != [plan.ffn_dim] * len(plan.keep) or max(map(max, named)) >= plan.teacher_ffn_dim):
        raise WanLiteError("The note of which FFN neurons the blocks kept does not fit them.",
                           f"Each of the {len(plan.keep)} blocks keeps {plan.ffn_dim} of {plan.teacher_ffn_dim}.")


def format_keep_map(keep: tuple[int, ...]) -> str:
    """(0, 1, 2, 3, 5) -> "0-3,5"; parse_keep_map reads it back."""
    runs: list[list[int]] = []
    for block in keep:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
