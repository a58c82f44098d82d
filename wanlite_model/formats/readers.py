"""Who opens a saved student: a property of its architecture, its layout and its dtype, told for the report and the model card.

What stands here was tried on tiny WANs of each kind, with ComfyUI 0.3.75, 0.8 and 0.33, ComfyUI-GGUF, Wan-Video's 2.1 and 2.2 code and diffusers 0.42;
of WanVideoWrapper its code was read (nodes_model_loading.py). `python -m benchmarks.readers` tries it again, and fails where it is not true.
"""
from __future__ import annotations

from typing import NamedTuple

from ..config import WanConfig
from . import fp8

WRAPPER = {1536: (30, 16), 3072: (30, 48), 5120: (40, 16)}          # width: (blocks, channels out) that WanVideoWrapper builds whatever the file holds


class Reader(NamedTuple):
    """how: what to call with the saved folder or file; why_not: the reason why it does not open this one, else empty."""
    name: str
    how: str
    why_not: str = ""


def readers(config: WanConfig, layout: str, dtype: str, diffs: bool = False) -> tuple[Reader, ...]:
    """Every reader of WAN that we know, those that open it first. layout, dtype: as pairs.py calls them. diffs: whether a LoRA changes norms or biases too."""
    found = (_comfyui(layout), _wrapper(config, layout), _wan_code("2.1", config, layout, dtype), _wan_code("2.2", config, layout, dtype),
             _diffusers(config, layout, dtype, diffs), _wanlite(layout))
    return tuple(sorted(found, key=lambda reader: bool(reader.why_not)))


def told(config: WanConfig, layout: str, dtype: str, diffs: bool = False) -> str:
    """The same in a sentence or two; readers with the same reason stand together."""
    opens: list[str] = []
    refuse: dict[str, list[str]] = {}
    for reader in readers(config, layout, dtype, diffs):
        (refuse.setdefault(reader.why_not, []) if reader.why_not else opens).append(reader.name)
    not_in = "; not in ".join(f"{_and(names)} ({why})" for why, names in refuse.items())
    return f"It opens in {_and(opens)}" + (f"; not in {not_in}." if not_in else ".")


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _comfyui(layout: str) -> Reader:
    if layout == "GGUF":
        return Reader("ComfyUI-GGUF", "Unet Loader (GGUF)")
    if layout == "LoRA":
        return Reader("ComfyUI", "Load LoRA, on the base model")
    return Reader("ComfyUI", "Load Diffusion Model", "it does not read diffusers' names" if layout == "diffusers folder" else "")


def _wrapper(config: WanConfig, layout: str) -> Reader:
    blocks, channels = WRAPPER.get(config.dim, (0, 0))
    why = ("it does not read diffusers' names" if layout == "diffusers folder" else
           f"it builds no WAN of width {config.dim}" if not blocks else
           f"it builds {blocks} blocks at width {config.dim}, and this has {config.num_layers}" if blocks != config.num_layers else
           f"it builds {channels} channels at width {config.dim}, and this has {config.out_dim}" if channels != config.out_dim else "")
    return Reader("WanVideoWrapper", "WanVideo Lora Select, on the base model" if layout == "LoRA" else "WanVideo Model Loader", why)


def _wan_code(version: str, config: WanConfig, layout: str, dtype: str) -> Reader:
    two_point_one = version == "2.1"
    why = (_no_folder(layout, dtype) or
           ("its class has no ti2v" if config.model_type == "ti2v" and two_point_one else
            "its class has no image embedding (img_emb)" if config.img_emb and not two_point_one else
            "its class wants the image embedding (img_emb) of 2.1, which this has not" if config.model_type == "i2v" and not config.img_emb and two_point_one
            else ""))
    return Reader(f"Wan {version}'s code", "WanModel.from_pretrained(folder)", why)


def _diffusers(config: WanConfig, layout: str, dtype: str, diffs: bool) -> Reader:
    if layout == "diffusers folder":
        return Reader("diffusers", "WanTransformer3DModel.from_pretrained(folder)")
    if layout == "LoRA":
        return Reader("diffusers", "WanPipeline.load_lora_weights(file), with peft",
                      "it does not take what this LoRA changes of norms and biases" if diffs else "")
    two = config.model_type == "flf2v" and config.img_emb
    without = "it wants the config.json of a folder" if layout == "GGUF" else _no_folder(layout, dtype)         # with one it reads GGUF
    return Reader("diffusers", "WanTransformer3DModel.from_single_file(file, config=folder)",
                  without or ("its from_single_file does not know img_emb.emb_pos: save a diffusers folder" if two else ""))


def _wanlite(layout: str) -> Reader:
    place = "folder" if layout in ("folder", "diffusers folder") else "file"
    return Reader("WanLite", "start_from in WanLite Recipe" if layout == "LoRA" else f"WanLiteStudent.from_pretrained({place})")


def _no_folder(layout: str, dtype: str) -> str:
    """Why Wan-Video's code and diffusers cannot open this layout."""
    if dtype == fp8.NAME:
        return "it does not know fp8's scales and would compute nonsense"
    return {"single file": "it wants the config.json of a folder", "GGUF": "it wants safetensors and a config.json", "LoRA": "its WanModel loads no LoRA",
            "diffusers folder": "it does not read diffusers' names"}.get(layout, "")
