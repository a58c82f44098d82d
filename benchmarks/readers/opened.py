"""Every reader of WAN on a student's file: the velocity that it answers. What it raises is left to who asks."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers_wan_video import ask_wan_video, wan_video
from torch import Tensor

from benchmarks.readers_gguf import open_with_comfyui_gguf
from wanlite_model.formats.lora import read_lora
from wanlite_model.formats.read import open_wan
from wanlite_model.formats.saving import MODEL_FILE
from wanlite_model.transformer import WanLiteStudent

from .asked import Asked
from .exports import Written
from .storages import bridge

Reads = Callable[[Written, Asked], Tensor]


class NotTried(Exception):
    """Why this reader was not asked."""


def openers(custom_node: Path | None, wan21: Path | None) -> dict[str, Reads]:
    """{reader, as formats/readers.py calls it: its velocity}. custom_node: ComfyUI-GGUF's folder. wan21: the folder of Wan 2.1's code."""
    return {"ComfyUI": by_comfyui, "ComfyUI-GGUF": partial(by_comfyui_gguf, custom_node=custom_node),
            "Wan 2.1's code": partial(by_wan_code, code=wan21) if wan21 else partial(_absent, "not tried without --wan21"),
            "Wan 2.2's code": partial(by_wan_code, code=None), "diffusers": by_diffusers, "WanLite": by_wanlite,
            "WanVideoWrapper": partial(_absent, "code read only")}


def by_comfyui(written: Written, asked: Asked) -> Tensor:
    """As Load Diffusion Model and Load LoRA do."""
    import comfy.sd
    import comfy.utils
    adapter = written.export.layout == "LoRA"
    model = comfy.sd.load_diffusion_model(str(written.base / MODEL_FILE if adapter else _file(written.path)))
    if adapter:
        model = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(written.path), safe_load=True), 1.0, 0.0)[0]
    return _velocity(model, asked)


def by_comfyui_gguf(written: Written, asked: Asked, custom_node: Path | None) -> Tensor:
    if custom_node is None:
        raise NotTried("not tried without --gguf")
    return _velocity(open_with_comfyui_gguf(written.path, custom_node), asked)


def by_wan_code(written: Written, asked: Asked, code: Path | None) -> Tensor:
    model = wan_video(code).WanModel.from_pretrained(str(_for_folders(written))).eval()
    with torch.no_grad():
        return ask_wan_video(model, asked.network)


def by_diffusers(written: Written, asked: Asked) -> Tensor:
    given = asked.network
    pictures = None if given.clip is None else given.clip.unflatten(1, (-1, 257)).flatten(0, 1)         # one by one
    model = _with_lora(written) if written.export.layout == "LoRA" else _in_diffusers(written)
    with torch.no_grad():
        return model.eval()(given.x, given.t if given.t.ndim == 1 else given.per_token, given.context, pictures, return_dict=False)[0]


def by_wanlite(written: Written, asked: Asked) -> Tensor:
    if written.export.layout != "LoRA":
        return asked.answered(WanLiteStudent.from_pretrained(written.path, torch_dtype=torch.float32))
    with open_wan(written.base) as source:
        merged = read_lora(written.path, source.config).merged(source.tensors())
        return asked.answered(WanLiteStudent.filled(source.config, merged, torch.float32, "cpu"))


def _absent(why: str, *_: Any) -> Tensor:
    raise NotTried(why)


def _velocity(model: Any, asked: Asked) -> Tensor:
    """Of a MODEL, by ComfyUI's own forward."""
    return bridge("teacher").ComfyTeacher(model).velocity(asked.x, asked.sigma, asked.cond)


def _file(path: Path) -> Path:
    """The weights in a folder, or the file itself."""
    return next(path.glob("*.safetensors")) if path.is_dir() else path


def _for_folders(written: Written) -> Path:
    """What a reader of folders is given. Of fp8 it is said to compute nonsense, so it is given what it wants otherwise."""
    return written.as_folder() if written.export.dtype == "fp8" else written.path


def _in_diffusers(written: Written) -> Any:
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
    place = _for_folders(written)
    if written.export.layout == "diffusers folder":
        return WanTransformer3DModel.from_pretrained(str(place), torch_dtype=torch.float32)
    options = {"config": str(place)} if place.is_dir() else {"local_files_only": True}         # without a config it would look for one on the net
    if written.export.layout == "GGUF":
        options["quantization_config"] = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return WanTransformer3DModel.from_single_file(str(_file(place)), torch_dtype=torch.float32, **options)


def _with_lora(written: Written) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    if importlib.util.find_spec("peft") is None:
        raise NotTried("not tried without peft")
    model = WanTransformer3DModel.from_pretrained(str(written.base_for_diffusers()), torch_dtype=torch.float32)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model)
    pipeline.load_lora_weights(str(written.path))
    return model
