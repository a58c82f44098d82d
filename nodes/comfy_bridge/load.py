"""A MODEL from a file or folder, as ComfyUI's own loader makes it, with its shift set as ModelSamplingSD3 sets it."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.read import open_wan


def open_model(path: Path, shift: float | None = None, dtype: torch.dtype | None = None) -> Any:
    """The MODEL in a .safetensors file, or in a WAN or diffusers folder. shift: None leaves ComfyUI's default of 8.

    A single file goes to the stock loader as it is, quantised or not. Raises WanLiteError when it is not a WAN.
    """
    options = {} if dtype is None else {"dtype": dtype}
    file = path if path.is_file() else _only_file(path)
    if file is not None:
        try:
            model = comfy.sd.load_diffusion_model(str(file), model_options=options)
        except RuntimeError as error:
            raise WanLiteError(f"ComfyUI cannot open {file.name}: {str(error).splitlines()[0]}.", "",
                               "Choose a WAN file from models/diffusion_models.") from error
    else:
        with open_wan(path) as source:      # shards or diffusers names: newer ComfyUIs cannot load these again from disk by themselves
            model = comfy.sd.load_diffusion_model_state_dict({name: tensor for name, tensor in source.tensors()}, model_options=options)
    return model if shift is None else with_shift(model, shift)


def with_shift(model: Any, shift: float) -> Any:
    """A clone of the MODEL that samples with this shift."""
    return ModelSamplingSD3().patch(model, shift)[0]


def _only_file(folder: Path) -> Path | None:
    """The one file of a folder in WAN's own names, which the stock loader can take."""
    files = sorted(folder.glob("*.safetensors"))
    config = folder / "config.json"
    ours = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("_class_name") == "WanModel"
    return files[0] if len(files) == 1 and ours else None
