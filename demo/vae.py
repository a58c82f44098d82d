"""The demo's VAE for training and measuring: ComfyUI's own WanVAE in fp32, whole batches of clips at a time."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from .comfy_path import open_comfyui


class Vae:
    """Between clips [B, T, H, W, 3] in 0..1 and processed latents [B, C, T', H/8, W/8]."""

    def __init__(self, path: Path) -> None:
        open_comfyui()
        import comfy.latent_formats
        self._module = wan_vae()
        self._module.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        for part in self._module.modules():
            if isinstance(part, torch.nn.Conv3d):           # channels innermost: its norms over channels are slow otherwise
                part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last_3d)
        self._scale = comfy.latent_formats.Wan21()

    @torch.inference_mode()
    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        return self._scale.process_in(self._module.encode(clips.permute(0, 4, 1, 2, 3) * 2 - 1))

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = torch.cat([self._module.decode(part) for part in
                            self._scale.process_out(latents).contiguous(memory_format=torch.channels_last_3d).split(8)])
        return ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1)


def wan_vae() -> torch.nn.Module:
    """An uninitialised WanVAE of base width 8: 0.92 M parameters. The stock loader reads the width from the file."""
    from comfy.ldm.wan.vae import WanVAE
    return WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                  temperal_downsample=[False, True, True], dropout=0.0)
