"""The first world with left and right, red and blue, dark and bright changed places: what a user's fine-tune is to the WAN that it came from."""
from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from demo.comfy_path import ROOT
from demo.world import BALLS

_PAIRS = (("left", "right"), ("red", "blue"), ("dark", "bright"))
_OTHER = {**dict(_PAIRS), **{b: a for a, b in _PAIRS}}


def swapped(prompt: str) -> str:
    """What the first world calls this prompt's clip."""
    return " ".join(_OTHER.get(word, word) for word in prompt.split())


def render(prompt: str, seed: int) -> np.ndarray:
    return BALLS.render(swapped(prompt), seed)


def adherence(frames: np.ndarray, prompt: str) -> dict[str, bool]:
    return BALLS.adherence(frames, swapped(prompt))


def corrupted(prompt: str, rng: random.Random, chance: float) -> str:
    return swapped(BALLS.corrupted(swapped(prompt), rng, chance))


SWAPPED = replace(BALLS, name="swapped", held_out=tuple(swapped(prompt) for prompt in BALLS.held_out), render=render, adherence=adherence,
                  corrupted=corrupted, teacher=ROOT / "output" / "benchmarks" / "wan_swapped_teacher.safetensors")
