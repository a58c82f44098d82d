"""A world of clips whose prompts can be read back from the pixels, with the tiny WAN that draws them."""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wanlite_model.config import WanConfig
from wanlite_model.prompts import PromptBank

from . import domain, judge, words

WEIGHTS = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """prompts: all of them, in a fixed order; held_out: those that the teacher was never trained on.

    render(prompt, seed) -> a clip [T, H, W, 3] in 0..1; adherence(clip, prompt) -> {attribute: shown as asked};
    corrupted(prompt, rng, chance) -> the prompt with each attribute drawn anew by that chance. latents: (C, T, H, W) of a clip.
    moving: the attribute that a single frame cannot show. config, teacher: the tiny WAN's architecture and file.
    shift, cfg, negative: how it is sampled.
    """
    name: str
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    render: Callable[[str, int], np.ndarray]
    adherence: Callable[[np.ndarray, str], dict[str, bool]]
    corrupted: Callable[[str, random.Random, float], str]
    config: WanConfig
    teacher: Path
    moving: str = "motion"
    latents: tuple[int, int, int, int] = domain.LATENT_SHAPE
    shift: float = domain.SHIFT
    cfg: float = domain.CFG
    negative: str = domain.NEGATIVE

    @property
    def training(self) -> tuple[str, ...]:
        """The prompts that the teacher knows, and that its students learn from."""
        return tuple(prompt for prompt in self.prompts if prompt not in self.held_out)

    def pairs(self, count: int, first: int = 0) -> list[tuple[str, torch.Tensor]]:
        """`count` fixed prompts and noises [C, T, H, W] from number `first` on: what a KSampler with seed i starts from for pair i."""
        prompts = list(self.prompts)
        random.Random(0).shuffle(prompts)       # nosec B311  # the same order each time
        return [(prompts[i % len(prompts)], torch.randn(self.latents, generator=torch.Generator().manual_seed(i)))
                for i in range(first, first + count)]

    def bank(self) -> PromptBank:
        """The training prompts with their embeddings: what a student learns from."""
        return PromptBank(prompts=self.training, contexts=tuple(words.embed(prompt) for prompt in self.training), negative_text=self.negative,
                          negative=torch.zeros(1, words.WIDTH))


BALLS = World(name="balls", prompts=domain.all_prompts(), held_out=domain.held_out_prompts(), render=domain.render,
              adherence=judge.adherence, corrupted=domain.corrupted,
              config=WanConfig(dim=128, ffn_dim=512, num_layers=12), teacher=WEIGHTS / "wan_tiny_teacher.safetensors")
