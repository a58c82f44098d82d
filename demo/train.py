"""Rebuilds demo/weights from nothing: `python -m demo.train`. An hour or more on two idle CPU cores (an estimate).

Killed, the same command goes on: after the VAE, after the latents, or from the teacher's last 250 steps. What it needs
beside the project's environment is a ComfyUI (see comfy_path). Intermediate files lie in output/demo_training.
"""
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import train_teacher, train_vae
from .measure import TEACHER, VAE, measure_teacher
from .vae import Vae
from .workers import Workers
from .world import BALLS, WEIGHTS

WORK = Path(__file__).resolve().parent.parent / "output" / "demo_training"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for folder in (WORK, WEIGHTS):
        folder.mkdir(parents=True, exist_ok=True)
    vae_file, latents_file = WORK / "vae.safetensors", WORK / "latents.safetensors"
    if not vae_file.is_file():
        train_vae.train(vae_file)
    vae = Vae(vae_file)
    recipe = train_teacher.Recipe()
    with Workers() as workers:
        if not latents_file.is_file():
            train_teacher.encode_clips(BALLS, recipe, vae.encode, latents_file, workers)
        teacher = train_teacher.train(BALLS, recipe, latents_file, WORK, workers,
                                      lambda model: measure_teacher(model, vae, workers, steps=16, cfg=BALLS.cfg, count=48))
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in teacher.state_dict().items()},
              TEACHER, metadata={"format": "pt"})
    VAE.write_bytes(vae_file.read_bytes())


if __name__ == "__main__":
    main()
