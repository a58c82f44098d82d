"""LATENT sockets hold what a VAE hands out; the engine works in processed space."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...wanlite_model.errors import WanLiteError


def shape_of(latent: dict[str, Any], channels: int) -> tuple[int, int, int, int]:
    """(C, T, H, W) of one sample. Raises WanLiteError when it is no video latent of this many channels."""
    return tuple(_samples(latent, channels).shape[1:])


def training_latents(latent: dict[str, Any], model: Any, channels: int) -> Tensor | None:
    """[N, C, T, H, W] in processed space, or None when the LATENT is empty and only tells a size. Raises WanLiteError."""
    samples = _samples(latent, channels)
    if not samples.any():
        return None
    if latent.get("noise_mask") is not None:
        raise WanLiteError("The LATENT carries a noise mask.", "Training data is whole clips.", "Connect the LATENT from before the mask was set.")
    with torch.inference_mode(False):
        return model.get_model_object("latent_format").process_in(samples.detach().float().cpu().clone())


def _samples(latent: dict[str, Any], channels: int) -> Tensor:
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim not in (4, 5):
        raise WanLiteError("The LATENT is not a video.", "WAN's latents are [N, 16, frames, height / 8, width / 8].",
                           "Use EmptyHunyuanLatentVideo, or encode a clip with WAN's VAE.")
    if samples.shape[1] != channels:
        raise WanLiteError(f"The LATENT has {samples.shape[1]} channels.", f"This WAN's latents have {channels}.",
                           "Use EmptyHunyuanLatentVideo for an empty one, or encode pictures with WAN's VAE.")
    return samples if samples.ndim == 5 else samples.unsqueeze(2)       # a picture is a clip of one frame
