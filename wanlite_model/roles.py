"""Which of WAN 2.2 A14B's two experts is meant, and where one takes over from the other."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .config import WanConfig
from .errors import WanLiteError
from .kinds import check_kinds

Side = Literal["high", "low"]
SIDES: tuple[Side, ...] = ("high", "low")
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}         # Wan-Video's own (wan/configs/wan_t2v_A14B.py, wan_i2v_A14B.py), of the shifted sigma
OVERLAP = 0.02                                  # of sigma that each is also taught beyond it: a sampler that switches by steps hits it only nearly


def is_expert(config: WanConfig) -> bool:
    """Whether such a WAN can only be one of two: 2.2's image-to-video, which has no CLIP branch. 2.2's text-to-video looks like 2.1's."""
    return config.model_type == "i2v" and not config.img_emb


def boundary_of(config: WanConfig) -> float:
    """The sigma that 2.2's experts of this kind share at."""
    return BOUNDARIES.get(config.model_type, BOUNDARIES["t2v"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """Which of two experts is meant, and the sigma that the low one takes over at. Raises WanLiteError on other values."""
    side: Side
    boundary: float

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.side not in SIDES:
            raise WanLiteError(f"The expert is {self.side!r}.", f"It is {' or '.join(map(repr, SIDES))}.")
        if not 0 < self.boundary < 1:
            raise WanLiteError(f"The boundary between the experts is {self.boundary}.", "It is a sigma between 0 and 1.",
                               f"WAN's own are {BOUNDARIES['t2v']} for text-to-video and {BOUNDARIES['i2v']} for image-to-video.")

    def owns(self, sigma: Tensor) -> Tensor:
        """Where [...] this expert answers."""
        above = sigma >= self.boundary - 1e-6           # a schedule's own sigma at the boundary is the high one's, rounded or not
        return above if self.side == "high" else ~above

    def turns(self, sigmas: Tensor) -> range:
        """Those of the steps along falling sigmas [K + 1] that begin on its side."""
        owned = self.owns(sigmas[:-1]).nonzero().flatten().tolist()
        return range(owned[0], owned[-1] + 1) if owned else range(0)
