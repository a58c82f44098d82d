"""Wan-Video's own model, as a test can run it."""
import importlib
import importlib.util
import inspect
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F


def wan_video(code=None):
    """Wan-Video's model file alone: its package imports much that is not installed, and its attention runs on CUDA only.

    code: a folder with the package `wan` in it, of 2.1 or 2.2; without one, the package that is installed, of 2.2.
    """
    folder = (Path(code).resolve() / "wan" if code else Path(importlib.util.find_spec("wan").submodule_search_locations[0])) / "modules"
    name = "wan_video_reference" + (str(folder).replace(".", "_x_") if code else "")
    if name not in sys.modules:
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


def ask_wan_video(model, asked):
    """The velocity at what helpers_variants.given makes, one sample at a time.

    An image-to-video WAN is given what stands beside the noise as a list of its own. 2.1 takes one timestep, and CLIP features of each picture for
    itself; 2.2 takes a timestep for each token, and no features.
    """
    tokens, noise = asked.per_token, 16 if model.model_type in ("i2v", "flf2v") else asked.x.shape[1]
    first = "clip_fea" in inspect.signature(model.forward).parameters
    answers = []
    for i, x in enumerate(asked.x):
        pictures = {"clip_fea": asked.clip[i].reshape(-1, 257, 1280)} if first and asked.clip is not None else {}
        answers += model([x[:noise]], (asked.t if first else tokens)[i:i + 1], [asked.context[i]], tokens.shape[1], y=[x[noise:]] if len(x) > noise else None,
                         **pictures)
    return torch.stack(answers)
