"""The benchmark's worlds and the teachers that the demo does not bring: `python -m benchmarks.teachers` trains them into output/benchmarks.

On two CPU cores the second world's takes half an hour to an hour and the changed one's ten minutes; it goes on where it was stopped, and the full
quality table does the same for what is not there.
"""
from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from demo import train_teacher
from demo.comfy_path import ROOT
from demo.measure import VAE, measure_teacher
from demo.train_teacher import Recipe
from demo.vae import Vae
from demo.workers import Workers
from demo.world import BALLS, World
from wanlite_model.transformer import WanLiteStudent

from .bars import BARS
from .swapped import SWAPPED

WORLDS = {world.name: world for world in (BALLS, BARS, SWAPPED)}
WORK = ROOT / "output" / "benchmarks"
RECIPE_KEY = "recipe"                           # in a teacher's file: a hash of what it was trained by
RECIPES = {BARS.name: Recipe(steps=1500),
           SWAPPED.name: Recipe(steps=1000, clips_per_prompt=8, muon_lr=2e-3, adam_lr=1e-3, warm_up=20, ema=0.99)}      # goes on from the first world's


def train(world: World) -> None:
    """Trains the world's teacher where it is not there yet, or was trained by another recipe."""
    if world.name not in RECIPES:
        return
    recipe = RECIPES[world.name]
    told = hashlib.sha256(repr((recipe, world.config)).encode()).hexdigest()[:8]
    if trained_by(world.teacher) == told:
        return
    work = WORK / f"{world.name}-{told}"
    work.mkdir(parents=True, exist_ok=True)
    start = WanLiteStudent.from_pretrained(BALLS.teacher, torch_dtype=torch.float32) if world.name == SWAPPED.name else None
    vae, latents = Vae(VAE), work / "latents.safetensors"
    with Workers() as workers:
        if not latents.is_file():
            train_teacher.encode_clips(world, recipe, vae.encode, latents, workers)
        model = train_teacher.train(world, recipe, latents, work, workers,
                                    lambda model: measure_teacher(model, vae, workers, steps=16, cfg=world.cfg, count=48, world=world), start)
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}, world.teacher,
              metadata={"format": "pt", RECIPE_KEY: told})


def trained_by(file: Path) -> str:
    """Which recipe made the teacher's file; empty where there is none."""
    try:
        with safe_open(file, "pt") as stored:
            return (stored.metadata() or {}).get(RECIPE_KEY, "")
    except (OSError, SafetensorError):
        return ""


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for world in WORLDS.values():
        train(world)
