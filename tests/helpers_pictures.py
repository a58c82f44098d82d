"""Tiny WANs that are told pictures, and prompts that come with some."""
import torch
from helpers_tiny import random_bank

from wanlite_model.cond import Shown
from wanlite_model.prompts import PromptBank

FIELDS = {
    "2.1 I2V": dict(model_type="i2v", in_dim=36, image_dim=1280),
    "FLF2V": dict(model_type="flf2v", in_dim=36, image_dim=1280),
    "2.2 I2V": dict(model_type="i2v", in_dim=36),
    "TI2V": dict(model_type="ti2v", num_channels=48),
}
TOLD = {"2.1 I2V": ("image", "clip_fea"), "FLF2V": ("image", "clip_fea"), "2.2 I2V": ("image",), "TI2V": ("given",)}


def shape_of(kind, frames=3, size=4):
    """(C, T, H, W) of its latents."""
    return FIELDS[kind].get("num_channels", 16), frames, size, size


def pictures(kind, count, shape, seed=0, tokens=None):
    """What is shown with each of `count` prompts, no two alike. tokens: of CLIP vision; None are as many as there are of such a WAN's pictures."""
    draw = torch.Generator().manual_seed(1000 + seed)
    sizes = {"image": (20, *shape[1:]), "clip_fea": (tokens or (514 if kind == "FLF2V" else 257), 1280), "given": (shape[0], 1, *shape[2:])}
    return tuple(Shown(**{name: torch.randn(sizes[name], generator=draw) for name in TOLD[kind]}) for _ in range(count))


def with_shown(bank, shown):
    return PromptBank(prompts=bank.prompts, contexts=bank.contexts, negative_text=bank.negative_text, negative=bank.negative, shown=tuple(shown))


def picture_bank(kind, count, shape, seed=0, tokens=None):
    """Prompts for such a WAN, with the texts of `random_bank`."""
    return with_shown(random_bank(count, seed), pictures(kind, count, shape, seed, tokens))
