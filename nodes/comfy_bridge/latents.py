"""LATENT sockets hold what a VAE hands out; the engine works in processed space."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from ...wanlite_model.config import video_size
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.workflow import VAE, VAE_5B
from .conditions import given_frames, processed


def shape_of(latent: dict[str, Any], channels: int) -> tuple[int, int, int, int]:
    """(C, T, H, W) of one sample. Raises WanLiteError when it is no video latent of this many channels."""
    return tuple(_samples(latent, channels).shape[1:])


def size_of(latent: dict[str, Any]) -> tuple[int, int, int]:
    """Width and height in pixels, and frames, of the videos that a WAN's LATENT stands for."""
    return video_size(shape_of(latent, latent["samples"].shape[1]))


def training_latents(latent: dict[str, Any], channels: int) -> Tensor | None:
    """[N, C, T, H, W] in processed space, or None when the LATENT is empty and only tells a size. Raises WanLiteError."""
    samples = _samples(latent, channels)
    if not samples.any():
        return None
    if given_frames(latent):                # a size, and the frames that the prompts were encoded with
        return None
    return processed(samples)


def check_vae(vae: Any, channels: int) -> None:
    """Raises WanLiteError unless the VAE decodes latents of so many channels; one that does not say how many it does is tried."""
    found = getattr(vae, "latent_channels", channels)
    if found != channels:
        raise WanLiteError(f"The VAE is for latents of {found} channels.", f"This WAN's have {channels}.",
                           f"Load {VAE_5B if channels == 48 else VAE} with Load VAE.")


def _samples(latent: dict[str, Any], channels: int) -> Tensor:
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim not in (4, 5):
        raise WanLiteError("The LATENT is not a video.", f"This WAN's latents are [N, {channels}, frames, height, width].",
                           f"Use {_empty(channels)}, or encode a clip with this WAN's VAE.")
    if samples.shape[1] != channels:
        raise WanLiteError(f"The LATENT has {samples.shape[1]} channels.", f"This WAN's latents have {channels}.",
                           f"Use {_empty(channels)} for an empty one, or encode pictures with this WAN's VAE.")
    return samples if samples.ndim == 5 else samples.unsqueeze(2)       # a picture is a clip of one frame


def _empty(channels: int) -> str:
    """The stock node that makes an empty latent of so many channels."""
    return "Wan22ImageToVideoLatent" if channels == 48 else "EmptyHunyuanLatentVideo"
