"""The two experts of WAN 2.2 A14B: one answers at high noise, the other from the boundary down; each is taught by itself, on its own side."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .cond import Cond
from .errors import WanLiteError
from .formats.keymap import wan_size
from .roles import Role
from .teacher import Tap, Teacher


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Other:
    """The expert that a student is not made of, and the role of the one that it is."""
    teacher: Teacher
    role: Role

    def beside(self, own: Teacher) -> ExpertPair:
        """Both, as they answer together. Raises WanLiteError when they do not belong together."""
        high, low = (own, self.teacher) if self.role.side == "high" else (self.teacher, own)
        return ExpertPair(high, low, self.role.boundary)


class ExpertPair:
    """Both experts as one teacher: each answers on its own side."""

    def __init__(self, high: Teacher, low: Teacher, boundary: float) -> None:
        for name, ours, its in (("shift", high.shift, low.shift), ("architecture", high.config, low.config)):
            if ours != its:
                raise WanLiteError(f"The experts differ in their {name}: {ours} at high noise, {its} at low noise.", "One video is made by both.",
                                   "Connect the two files of one model, each through the same ModelSamplingSD3.")
        if high.fingerprint == low.fingerprint:
            raise WanLiteError("Both experts are the same weights.", "One is made for high noise and one for low noise.",
                               "Connect the other file of the pair as the other expert.")
        self.high, self.low, self.role = high, low, Role(side="high", boundary=boundary)
        self.config, self.shift, self.device, self.notes, self.name = high.config, high.shift, high.device, (*high.notes, *low.notes), high.name
        self.fingerprint = hashlib.sha256(f"{high.fingerprint} {low.fingerprint} {boundary}".encode()).hexdigest()[:16]
        self._asked: Teacher | None = None

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, *, skip: Collection[int] = (), taps: Mapping[str, Tap] = {}) -> Tensor:
        above = self.role.owns(sigma)                                                    # [B]
        if above.all() or not above.any():
            return self.ready(self.high if above.all() else self.low).velocity(x, sigma, cond, skip=skip, taps=taps)
        v = torch.empty_like(x, dtype=torch.float32)
        both = (self.high, above), (self.low, ~above)
        for teacher, rows in both[::-1] if self._asked is self.low else both:           # first the one that is in memory
            v[rows] = self.ready(teacher).velocity(x[rows], sigma[rows], cond[rows], skip=skip, taps=taps)
        return v

    def ready(self, teacher: Teacher) -> Teacher:
        """One of them, with the other one's memory freed where there is no room for both: a card that holds two is rare."""
        if self._asked is not None and self._asked is not teacher:
            self._asked.release(torch.bfloat16.itemsize * wan_size(self.config))
        self._asked = teacher
        return teacher

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        raise WanLiteError("Two experts have no weights in common.", "A student is made of one of them.", "Say which.")

    def release(self, needed: float = math.inf) -> None:
        self.high.release(needed)
        self.low.release(needed)
