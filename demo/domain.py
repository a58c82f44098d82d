"""The domain: one coloured ball crosses a plain background on which uncaptioned grey tiles lie.

A prompt names size, colour, motion and background; how far from the middle the ball passes and where the tiles lie is
chance. Nothing here needs torch, so that every other room of the demo can import it.
"""

import dataclasses
import itertools
import random

import numpy as np

SIZE = 64                               # pixels, both ways
FRAMES = 9                              # three latent frames: WAN's VAE keeps the first and folds four into one
LATENT_SHAPE = (16, 3, 8, 8)            # [C, T, H, W]
NEGATIVE = ""                           # a tenth of the training captions are empty
SHIFT = 5.0                             # of the teacher's sampling schedule
CFG = 4.0

_HIGH, _LOW = 0.92, 0.10
COLOURS = {
    "red": (_HIGH, _LOW, _LOW), "green": (_LOW, _HIGH, _LOW), "blue": (_LOW, _LOW, _HIGH),
    "yellow": (_HIGH, _HIGH, _LOW), "magenta": (_HIGH, _LOW, _HIGH), "cyan": (_LOW, _HIGH, _HIGH),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}     # (x, y), y grows downwards
BACKGROUNDS = {"dark": 0.10, "grey": 0.50, "bright": 0.90}
RADII = {"small": 8.0, "large": 14.0}
_TILE_GREYS = {"dark": 0.30, "grey": 0.70, "bright": 0.70}
_TRAVEL = 32.0                          # pixels between the first and the last frame
_ASIDE = 6.0                            # pixels, at most, from the middle of the picture to the middle of the way


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What a prompt says, and therefore what the judge can read back."""

    size: str
    colour: str
    motion: str
    background: str

    @property
    def prompt(self) -> str:
        return f"a {self.size} {self.colour} ball moving {self.motion} over a {self.background} background"


_COMBINATIONS = tuple(
    Attributes(size=size, colour=colour, motion=motion, background=background)
    for size, colour, motion, background in itertools.product(RADII, COLOURS, MOTIONS, BACKGROUNDS))
_BY_PROMPT = {attributes.prompt: attributes for attributes in _COMBINATIONS}


def all_prompts() -> tuple[str, ...]:
    """All 144 prompts, in a fixed order."""
    return tuple(_BY_PROMPT)


def held_out_prompts() -> tuple[str, ...]:
    """The 24 prompts that no training clip shows and no training caption says; their single words all occur."""
    return tuple(a.prompt for a in _COMBINATIONS if _is_held_out(a))


def training_prompts() -> tuple[str, ...]:
    """The other 120."""
    return tuple(a.prompt for a in _COMBINATIONS if not _is_held_out(a))


def parse(prompt: str) -> Attributes:
    """The attributes that `prompt` names. Raises KeyError for a text that is not one of `all_prompts()`."""
    return _BY_PROMPT[prompt]


def corrupted(prompt: str, rng: random.Random, chance: float) -> str:
    """The prompt with each of its attributes drawn anew, by that chance each on its own."""
    values = {"size": RADII, "colour": COLOURS, "motion": MOTIONS, "background": BACKGROUNDS}
    told = {name: rng.choice(list(choices)) for name, choices in values.items() if rng.random() < chance}
    return dataclasses.replace(parse(prompt), **told).prompt


def render(prompt: str, seed: int) -> np.ndarray:
    """One clip of `prompt`, float32 [T, H, W, 3] in 0..1; `seed` chooses the places that the prompt leaves open."""
    attributes = parse(prompt)
    rng = np.random.default_rng(seed)
    canvas = _background(attributes.background, rng)                                    # [H, W, 3]
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    radius, colour = RADII[attributes.size], np.array(COLOURS[attributes.colour])
    frames = np.empty((FRAMES, SIZE, SIZE, 3), dtype=np.float32)
    for frame, (centre_x, centre_y) in zip(frames, _path(attributes.motion, radius, rng), strict=True):
        inside = np.clip(radius - np.hypot(x - centre_x, y - centre_y) + 0.5, 0, 1)[..., None]      # [H, W, 1]
        frame[:] = canvas * (1 - inside) + colour * inside
    return frames


def _background(name: str, rng: np.random.Generator) -> np.ndarray:
    canvas = np.full((SIZE, SIZE, 3), BACKGROUNDS[name])
    for _ in range(rng.integers(1, 3)):
        left, top = rng.integers(0, SIZE - 10, 2)
        canvas[top:top + 10, left:left + 10] = _TILE_GREYS[name]
    return canvas


def _path(motion: str, radius: float, rng: np.random.Generator) -> np.ndarray:
    """The ball's centre in every frame, [T, 2] as (x, y): a straight way that never leaves the picture."""
    direction = np.array(MOTIONS[motion])
    half_way = np.abs(direction) * _TRAVEL / 2
    room = np.minimum(SIZE / 2 - radius - 1 - half_way, _ASIDE)
    middle = SIZE / 2 + rng.uniform(-room, room)
    return middle + np.linspace(-1, 1, FRAMES)[:, None] * half_way * np.sign(direction)


def _is_held_out(a: Attributes) -> bool:
    # a Latin pattern: every pair of values of two attributes still occurs in training
    index = (list(RADII).index(a.size) + list(COLOURS).index(a.colour) + list(MOTIONS).index(a.motion)
             + 2 * list(BACKGROUNDS).index(a.background))
    return index % 6 == 0
