"""A second world, of another shape and about other things: a bar grows, shrinks or rests at one side of the picture. Nothing was tuned on it."""
import itertools
import random
from dataclasses import astuple, dataclass, fields

import numpy as np

from demo import domain
from demo.comfy_path import ROOT
from demo.world import World
from wanlite_model.config import WanConfig

SHAPES = {"wide": (18.0, 8.0), "tall": (8.0, 18.0)}                             # half width and half height, pixels
COLOURS = {"scarlet": (0.92, 0.10, 0.10), "lemon": (0.92, 0.92, 0.10), "pink": (0.92, 0.10, 0.92), "aqua": (0.10, 0.92, 0.92)}
CHANGES = {"growing": (0.6, 1.3), "shrinking": (1.3, 0.6), "resting": (1.0, 1.0)}    # scale of the first and of the last frame
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}   # (x, y), y grows downwards
WALLS = {"black": 0.10, "white": 0.90}
_ASIDE, _CHANCE = 12.0, 4.0             # pixels from the middle to the place, and at most from there to the bar
_DISTANCE = 0.35                        # of a pixel's largest channel from the wall's grey, from which it belongs to the bar
_LEAST_AREA = 60                        # pixels of bar in the first and in the last frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What a prompt says."""
    change: str
    colour: str
    shape: str
    place: str
    wall: str

    @property
    def prompt(self) -> str:
        return f"{self.change} {self.shape} bar painted {self.colour} near the {self.place} of a {self.wall} wall"


_CHOICES = (CHANGES, COLOURS, SHAPES, PLACES, WALLS)
_NAMES = tuple(field.name for field in fields(Attributes))
_ALL = tuple(Attributes(**dict(zip(_NAMES, values))) for values in itertools.product(*_CHOICES))
_BY_PROMPT = {attributes.prompt: attributes for attributes in _ALL}


def corrupted(prompt: str, rng: random.Random, chance: float) -> str:
    """The prompt with each of its attributes drawn anew, by that chance each on its own."""
    told = astuple(_BY_PROMPT[prompt])
    return Attributes(**{name: rng.choice(list(choices)) if rng.random() < chance else value
                         for name, choices, value in zip(_NAMES, _CHOICES, told)}).prompt


def render(prompt: str, seed: int) -> np.ndarray:
    """One clip of `prompt`, float32 [T, H, W, 3] in 0..1; `seed` moves the bar a little."""
    a, rng = _BY_PROMPT[prompt], np.random.default_rng(seed)
    y, x = np.mgrid[:domain.SIZE, :domain.SIZE] + 0.5
    middle = domain.SIZE / 2 + _ASIDE * np.array(PLACES[a.place]) + rng.uniform(-_CHANCE, _CHANCE, 2)
    frames = np.empty((domain.FRAMES, domain.SIZE, domain.SIZE, 3), dtype=np.float32)
    for frame, scale in zip(frames, np.linspace(*CHANGES[a.change], domain.FRAMES), strict=True):
        across, up = scale * np.array(SHAPES[a.shape])
        inside = np.clip(np.minimum(across - np.abs(x - middle[0]), up - np.abs(y - middle[1])) + 0.5, 0, 1)[..., None]   # [H, W, 1]
        frame[:] = WALLS[a.wall] * (1 - inside) + np.array(COLOURS[a.colour]) * inside
    return frames


def adherence(frames: np.ndarray, prompt: str) -> dict[str, bool]:
    """Which attributes of `prompt` the clip [T, H, W, 3] shows. Raises KeyError for a prompt outside this world."""
    seen, wanted = read(frames), _BY_PROMPT[prompt]
    return {name: value == getattr(wanted, name) for name, value in seen.items()}


def read(frames: np.ndarray) -> dict[str, str | None]:
    """The attributes that the clip shows; None where the pixels do not say."""
    frames = np.asarray(frames, dtype=np.float32)
    border = np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)])
    wall = np.median(border)
    bar = np.abs(frames - wall).max(-1) > _DISTANCE                                     # [T, H, W]
    area = bar.sum((1, 2))                                                              # [T]
    seen: dict[str, str | None] = dict.fromkeys(_NAMES)
    seen["wall"] = min(WALLS, key=lambda name: abs(wall - WALLS[name]))
    if min(area[0], area[-1]) < _LEAST_AREA:
        return seen
    where = np.argwhere(bar)[:, 1:] + 0.5                                               # [N, 2] as (y, x)
    aside = (where.mean(0) - domain.SIZE / 2)[::-1]
    spread = where.std(0)
    growth = np.sqrt(area[-1] / area[0])
    seen["place"] = max(PLACES, key=lambda name: aside @ np.array(PLACES[name]))
    seen["shape"] = "wide" if spread[1] > spread[0] else "tall"
    seen["change"] = "growing" if growth > 1.35 else "shrinking" if growth < 1 / 1.35 else "resting"
    seen["colour"] = _colour(frames[bar])
    return seen


def _colour(pixels: np.ndarray) -> str:
    hue = pixels.mean(0) - pixels.mean()                                                # [3]
    palette = np.array(list(COLOURS.values()))
    palette = palette - palette.mean(-1, keepdims=True)
    return list(COLOURS)[int((palette @ hue / np.linalg.norm(palette, axis=-1)).argmax())]


def _is_held_out(a: Attributes) -> bool:
    index = sum(weight * list(choices).index(value) for weight, choices, value in zip((1, 1, 1, 1, 3), _CHOICES, astuple(a)))
    return index % 6 == 0


BARS = World(name="bars", prompts=tuple(_BY_PROMPT), held_out=tuple(a.prompt for a in _ALL if _is_held_out(a)), render=render,
             adherence=adherence, corrupted=corrupted, moving="change", config=WanConfig(dim=256, ffn_dim=512, num_layers=6),
             teacher=ROOT / "output" / "benchmarks" / "wan_bars_teacher.safetensors")

