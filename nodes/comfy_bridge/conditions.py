"""CONDITIONING as stock nodes make it, and what the engine is told instead: the same, in processed space."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import torch
from torch import Tensor

from ...wanlite_model.cond import Shown
from ...wanlite_model.config import CLIP_DIM, TEXT_LEN
from ...wanlite_model.errors import WanLiteError

MASK = 4                                    # channels of an image-to-video mask, before those of the picture's latents
UNDERSTOOD = {"pooled_output", "concat_latent_image", "concat_mask", "clip_vision_output", "guidance"}
FORMATS = {16: comfy.latent_formats.Wan21, 48: comfy.latent_formats.Wan22}


def processed(latents: Tensor) -> Tensor:
    """VAE latents [B, C, T, H, W] in processed space, float32 on the CPU. Raises WanLiteError on those of another VAE."""
    if latents.shape[1] not in FORMATS:
        raise WanLiteError(f"The VAE makes latents of {latents.shape[1]} channels.", "WAN's have 16, and those of 2.2 TI2V-5B 48.",
                           "Connect WAN's own VAE.")
    with torch.inference_mode(False):
        return FORMATS[latents.shape[1]]().process_in(latents.detach().float().cpu().clone())


def conditioning(context: Tensor, shown: Shown | None = None) -> list:
    """CONDITIONING for a stock sampler, from a context [L, 4096] and what is shown with it; given frames travel in the LATENT."""
    padded = torch.nn.functional.pad(context.float(), (0, 0, 0, TEXT_LEN - len(context)))
    told: dict[str, Any] = {"pooled_output": None}
    if shown is not None and shown.image is not None:
        image = shown.image.float().unsqueeze(0)
        told |= {"concat_latent_image": FORMATS[16]().process_out(image[:, MASK:]), "concat_mask": 1 - image[:, :MASK]}
    if shown is not None and shown.clip_fea is not None:
        told["clip_vision_output"] = comfy.clip_vision.Output()
        told["clip_vision_output"].penultimate_hidden_states = shown.clip_fea.float().unsqueeze(0)
    return [[padded.unsqueeze(0), told]]


def rows_of(given: list) -> Iterator[tuple[Tensor, Shown]]:
    """(context [L, 4096], what is shown with it) of every prompt in a CONDITIONING: each of its entries, and each row of these.

    Raises WanLiteError on what acts on the sampler, or tells a WAN what WanLite does not know of.
    """
    for embedded, options in given:
        told = {name: value for name, value in options.items() if value is not None}
        if strange := sorted(set(told) - UNDERSTOOD):
            raise WanLiteError(f"The CONDITIONING carries {strange[0]!r}.", "A student is taught texts and WanImageToVideo's pictures, for the whole frame and every step.",
                               "Connect the CONDITIONING from before the node that added this.")
        for row in range(len(embedded)):
            yield embedded[row].float().cpu(), _shown(told, min(row, _pictures(told) - 1))


def given_frames(latent: dict[str, Any]) -> list[Tensor]:
    """What Wan22ImageToVideoLatent keeps still: the first frames [C, F, H, W] of each clip of a LATENT; none without a noise mask.

    Raises WanLiteError on a mask of another form.
    """
    samples, mask = latent["samples"], latent.get("noise_mask")
    if mask is None:
        return []
    count = _still(mask.float().cpu(), samples)
    if not count:
        raise WanLiteError("The LATENT carries a noise mask.", "Only whole first frames can be kept, as Wan22ImageToVideoLatent does for 2.2 TI2V-5B.",
                           "Connect the LATENT from before the mask was set, or that of Wan22ImageToVideoLatent.")
    return list(processed(samples)[:, :, :count])


def still_frames(shown: Shown, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor | None]:
    """What a sampler starts from, in VAE space [1, C, T, H, W], and the mask of what it is to make; zeros and None where no frames are given."""
    start = torch.zeros(1, *shape)
    if shown.given is None:
        return start, None
    count, mask = shown.given.shape[1], torch.ones(1, 1, *shape[1:])
    mask[:, :, :count] = 0
    start[:, :, :count] = FORMATS[shape[0]]().process_out(shown.given.float().unsqueeze(0))
    return start, mask


def _still(mask: Tensor, samples: Tensor) -> int:
    """How many first frames a mask [B, 1, T, H, W] keeps, whole and in all clips alike, and nothing else; 0 where it is another mask."""
    if samples.ndim != 5 or samples.shape[1] != 48 or mask.shape != (len(samples), 1, *samples.shape[2:]):
        return 0
    frames = samples.shape[2]
    count = int((mask[0].amax((0, 2, 3)) == 0).sum())
    kept = (torch.arange(frames) >= count).float().view(1, 1, -1, 1, 1).expand_as(mask)
    return count if count < frames and torch.equal(mask, kept) else 0


def _pictures(told: dict[str, Any]) -> int:
    """Rows of what is shown: one to all of a CONDITIONING's texts, or one to each."""
    return len(told["concat_latent_image"]) if "concat_latent_image" in told else 1


def _shown(told: dict[str, Any], row: int) -> Shown:
    image = clip_fea = None
    if "concat_latent_image" in told:
        image = torch.cat((_mask(told, row), processed(told["concat_latent_image"][row:row + 1])[0]))
    if "clip_vision_output" in told:
        states = told["clip_vision_output"].penultimate_hidden_states
        clip_fea = states[min(row, len(states) - 1)].float().cpu().clone()           # [tokens, 1280]
        if clip_fea.shape[-1] != CLIP_DIM:
            raise WanLiteError(f"The CLIP vision output is {clip_fea.shape[-1]} wide.", f"WAN reads {CLIP_DIM}.", "Load clip_vision_h.safetensors.")
    return Shown(image=image, clip_fea=clip_fea)


def _mask(told: dict[str, Any], row: int) -> Tensor:
    """[4, T, H, W], 1 where the picture is known, as ComfyUI's WAN makes it of concat_mask; its frames beyond the mask's are unknown."""
    _, _, frames, height, width = told["concat_latent_image"].shape
    if "concat_mask" not in told:
        return torch.zeros(MASK, frames, height, width)
    known = 1 - told["concat_mask"][min(row, len(told["concat_mask"]) - 1)].float().cpu()            # [1 | 4, T', H, W]
    if known.shape[-2:] != (height, width):
        raise WanLiteError(f"The picture's mask is {known.shape[-1]} x {known.shape[-2]} and its latents {width} x {height}.", "", "Set both in one node: WanImageToVideo.")
    known = known if len(known) == MASK else known.mean(0, keepdim=True).expand(MASK, -1, -1, -1)
    return torch.nn.functional.pad(known, (0, 0, 0, 0, 0, frames - known.shape[1]))
