"""Trains the demo's VAE: ComfyUI's own WanVAE at base width 8, on clips of the domain.

Still crops first, where every causal convolution reduces to the last time slice of its kernel and costs a third; then
moving crops; then whole clips. The latents are held on the scale that ComfyUI normalises with, so that the diffusion
model sees about zero mean and unit spread in every channel.
"""

import contextlib
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from . import domain
from .comfy_path import open_comfyui
from .vae import wan_vae

log = logging.getLogger(__name__)

_LATENT_NOISE = 0.15            # what the decoder learns to forgive: a generated latent is never exact
_LATENT_WEIGHT = 0.05
_CLIPS = 1200


class Stage(NamedTuple):
    steps: int
    batch: int
    frames: int
    crop: int
    peak_lr: float


STAGES = (Stage(900, 24, 1, 32, 3e-3), Stage(260, 8, 9, 32, 1.5e-3), Stage(70, 4, 9, 64, 8e-4))


def train(path: Path, seed: int = 0) -> None:
    """Trains from nothing and writes the VAE to `path` in bf16, in the layout that the stock VAE loader opens."""
    open_comfyui()
    import comfy.latent_formats
    torch.manual_seed(seed)
    vae = _fresh_vae()
    scale = comfy.latent_formats.Wan21()
    clips = _pool(seed)                                                                 # [N, 3, T, H, W]
    for stage in STAGES:
        with _still_convolutions() if stage.frames == 1 else contextlib.nullcontext():
            _train_stage(vae, scale, clips, stage, random.Random(seed))     # nosec B311  # the same clips for the same seed
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _train_stage(vae, scale, clips, stage: Stage, rng: random.Random) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=stage.peak_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(stage.steps):
        progress = step / stage.steps
        optimizer.param_groups[0]["lr"] = stage.peak_lr * min(1, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-5
        pixels = _crops(clips, stage, rng)                                              # [B, 3, T, H, W] in -1..1
        latents = scale.process_in(vae.encode(pixels))                                  # [B, 16, T', H/8, W/8]
        noisy = latents + _LATENT_NOISE * torch.randn_like(latents)
        error = vae.decode(scale.process_out(noisy)) - pixels
        mean, spread = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))            # [16] each
        drift = mean.square().mean() + (spread - 1).square().mean()
        loss = error.abs().mean() + error.square().mean() + _LATENT_WEIGHT * drift
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == stage.steps - 1:
            log.info("vae %dx%d step %d: absolute error %.4f, squared %.5f, latent drift %.4f",
                     stage.frames, stage.crop, step, *(value.item() for value in (error.abs().mean(), error.square().mean(), drift)))


def _crops(clips: torch.Tensor, stage: Stage, rng: random.Random) -> torch.Tensor:
    crops = []
    for _ in range(stage.batch):
        top, left = (rng.randint(0, domain.SIZE - stage.crop) for _ in range(2))
        first = rng.randint(0, domain.FRAMES - stage.frames)
        crops.append(clips[rng.randrange(len(clips)), :, first:first + stage.frames,
                           top:top + stage.crop, left:left + stage.crop])
    return torch.stack(crops) * 2 - 1


def _pool(seed: int) -> torch.Tensor:
    prompts = domain.training_prompts()
    clips = [torch.from_numpy(domain.render(prompts[i % len(prompts)], seed + i)) for i in range(_CLIPS)]
    return torch.stack(clips).permute(0, 4, 1, 2, 3).contiguous()                       # [N, 3, T, H, W]


def _fresh_vae() -> torch.nn.Module:
    """A WanVAE that starts as an image autoencoder applied frame by frame: kernels act on the newest frame only."""
    from comfy.ldm.wan.vae import CausalConv3d, ResidualBlock
    vae = wan_vae()
    with torch.no_grad():
        for module in vae.modules():
            if not isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                continue
            newest = torch.empty_like(module.weight[:, :, -1] if module.weight.ndim == 5 else module.weight)
            torch.nn.init.normal_(newest, std=1 / math.sqrt(newest[0].numel()))
            module.weight.zero_()
            (module.weight[:, :, -1] if module.weight.ndim == 5 else module.weight).copy_(newest)
            torch.nn.init.normal_(module.bias, std=0.1)     # a grey pixel is zero: without a bias RMS_norm would divide by it
        for name, module in vae.named_modules():
            if isinstance(module, ResidualBlock):
                module.residual[-1].weight.mul_(0.2)
            if isinstance(module, CausalConv3d) and name.endswith("time_conv"):         # start by copying frames
                identity = torch.eye(module.in_channels).repeat(module.out_channels // module.in_channels, 1)
                module.weight.zero_()
                module.weight[:, :, -1, 0, 0] = identity
    return vae


@contextlib.contextmanager
def _still_convolutions() -> Iterator[None]:
    """One frame with nothing before it: only the last time slice of a causal kernel meets data. Exact."""
    from comfy.ldm.wan.vae import CausalConv3d
    causal = CausalConv3d.forward

    def still(self, x, cache_x=None, cache_list=None, cache_idx=None):                  # [B, C, 1, H, W]
        around = self.kernel_size[-1] // 2          # where a ComfyUI keeps its padding differs from version to version
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=around)[:, :, None]

    CausalConv3d.forward = still
    try:
        yield
    finally:
        CausalConv3d.forward = causal
