"""Seconds of a video through ComfyUI's own loader and sampler."""
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch

from . import words
from .comfy_path import open_comfyui
from .world import World

ROUNDS = 2
Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A file and how it is sampled."""
    file: Path
    world: World
    steps: int
    cfg: float


def timed(models: Mapping[Key, Sampled]) -> dict[Key, float]:
    """Mean seconds of one warm video each. The models come in turn, and each makes as many steps in its turn as the slowest one's video has, so
    that a machine's quick and slow moments fall on all of them alike.
    """
    open_comfyui()
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    opened = {key: ModelSamplingSD3().patch(comfy.sd.load_diffusion_model(str(model.file)), model.world.shift)[0] for key, model in models.items()}
    videos = {key: max(model.steps for model in models.values()) // model.steps for key, model in models.items()}
    for key, model in models.items():       # the first video is cold
        seconds_of(opened[key], model, 1)
    rounds = [{key: seconds_of(opened[key], model, videos[key]) for key, model in models.items()} for _ in range(ROUNDS)]
    return {key: fmean(found[key] for found in rounds) / videos[key] for key in models}


def seconds_of(opened: object, model: Sampled, videos: int) -> float:
    """Seconds that so many videos take."""
    import comfy.sample
    pairs = model.world.pairs(videos)
    begun = time.perf_counter()
    for prompt, noise in pairs:
        comfy.sample.sample(opened, noise[None], model.steps, model.cfg, "euler", "simple", [[words.context([prompt]), {}]],
                            [[words.context([model.world.negative]), {}]], torch.zeros(1, *model.world.latents), disable_pbar=True)
    return time.perf_counter() - begun
