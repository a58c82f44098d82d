"""What is done so that a job takes less memory: in the order in which it is done, from what costs least to what costs most."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from ..errors import WanLiteError
from ..kinds import check_kinds

SWAPPED = (0.25, 0.5, 0.75, 1.0)        # of the blocks
NEEDS = {"checkpoints_on_cpu": "checkpointing", "swapped_blocks": "checkpointing", "gradient_release": "optimizer_8bit"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Levers:
    """checkpointing: blocks are computed again in backward. checkpoints_on_cpu: what they are computed from waits in CPU memory.
    frozen_float8: the matrices under adapters are held in float8. optimizer_8bit: AdamW with moments of 8 bits, on a GPU over bf16 matrices
    that are rounded at random, with their average in CPU memory. gradient_release: with it, weights move as soon as their gradient is there, which
    is then freed. swapped_blocks: so many frozen blocks lie in CPU memory and visit.
    """
    checkpointing: bool = False
    checkpoints_on_cpu: bool = False
    frozen_float8: bool = False
    optimizer_8bit: bool = False
    gradient_release: bool = False
    swapped_blocks: int = 0

    def told(self) -> str:
        """In words, for a report."""
        names = {"checkpointing": "blocks computed twice", "checkpoints_on_cpu": "their inputs kept in CPU memory", "frozen_float8": "frozen weights in float8",
                 "optimizer_8bit": "8-bit AdamW", "gradient_release": "gradients freed one by one"}
        said = [words for name, words in names.items() if getattr(self, name)]
        return ", ".join([*said, *([f"{self.swapped_blocks} frozen blocks in CPU memory"] if self.swapped_blocks else [])]) or "none needed"


@dataclass(frozen=True, kw_only=True, slots=True)
class LeverSettings:
    """A user's say on memory and disk: None leaves a lever to the budget. gpu_gib, ram_gib, disk_gib: of the machine to plan for; 0 is what is free on
    this one. cache_gib, runs_gib: what the teacher's answers and the runs of all jobs may take; 0 is any amount (see room.py).

    Raises WanLiteError where one asks for what another forbids.
    """
    checkpointing: bool | None = None
    checkpoints_on_cpu: bool | None = None
    frozen_float8: bool | None = None
    optimizer_8bit: bool | None = None
    gradient_release: bool | None = None
    swapped_blocks: int | None = None
    gpu_gib: float = 0.0
    ram_gib: float = 0.0
    disk_gib: float = 0.0
    cache_gib: float = 0.0
    runs_gib: float = 0.0

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, needed in NEEDS.items():
            if getattr(self, needed) is False and getattr(self, name):
                raise WanLiteError(f"{name} is on and {needed} is off.", "The one does nothing without the other.", f"Leave {needed} at auto.")
        if min(self.gpu_gib, self.ram_gib, self.disk_gib, self.cache_gib, self.runs_gib, self.swapped_blocks or 0) < 0:
            raise WanLiteError("A size in the settings is below 0.", "0 is what this machine has, or no limit.")


def ladder(settings: LeverSettings, *, frozen: bool, blocks: int, device_type: str) -> Iterator[Levers]:
    """Levers that take less and less memory. frozen: whether adapters are trained, over so many blocks. What is set stays so on every rung."""
    # On a CPU there is no other memory to move things to.
    usable = {"checkpointing": True, "checkpoints_on_cpu": device_type != "cpu", "frozen_float8": frozen and device_type != "mps",
              "optimizer_8bit": not frozen, "gradient_release": not frozen, "swapped_blocks": frozen and device_type != "cpu"}
    asked = {field.name: getattr(settings, field.name) for field in fields(Levers)}
    on = {name: value for name, value in asked.items() if value and usable[name]}
    on |= {NEEDS[name]: True for name in NEEDS if name in on}
    levers = Levers(**{**on, "swapped_blocks": min(blocks, on.get("swapped_blocks", 0))})
    yield levers
    free = [name for name, value in asked.items() if value is None and usable[name] and name not in on and asked.get(NEEDS.get(name)) is not False]
    for name in free:
        if name != "swapped_blocks":
            levers = replace(levers, **{name: True})
            yield levers
    for share in SWAPPED if "swapped_blocks" in free else ():
        yield replace(levers, swapped_blocks=max(1, round(share * blocks)))
