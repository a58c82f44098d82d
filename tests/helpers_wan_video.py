"""Wan-Video's own model, as a test can run it."""
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch.nn.functional as F


def wan_video():
    """Wan-Video's model file alone: its package imports much that is not installed, and its attention runs on CUDA only."""
    name = "wan_video_reference"
    if name not in sys.modules:
        folder = Path(importlib.util.find_spec("wan").submodule_search_locations[0]) / "modules"
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    module = importlib.import_module(f"{name}.model")
    module.flash_attention = sdpa
    return module


def sdpa(q, k, v, k_lens=None, window_size=(-1, -1)):
    """What flash_attention computes for samples of full length: q, k, v [B, L, heads, d]."""
    assert window_size == (-1, -1) and (k_lens is None or all(int(n) == k.shape[1] for n in k_lens))
    return F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)
