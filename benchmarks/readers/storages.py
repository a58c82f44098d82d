"""A teacher in every storage: written, opened by ComfyUI, and read without it."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers_storage import E4M3, E5M2, Kept, is_linear, plain, scaled, write_gguf
from torch import Tensor

from benchmarks.readers_gguf import open_with_comfyui_gguf
from demo.comfy_path import pack_module
from wanlite_model.config import WanConfig
from wanlite_model.formats.keymap import key_map, rows_of
from wanlite_model.formats.lora import Factors, Lora, read_lora, write_lora
from wanlite_model.formats.read import open_wan
from wanlite_model.teacher import FileTeacher, Teacher
from wanlite_model.transformer import WanLiteStudent

RANK = 4
GGUF, PATCHED, DIFFUSERS, WAN = "GGUF Q8_0", "bf16 with a LoRA", "diffusers folder, bf16 in shards", "Wan folder, bf16 in shards"


def _in_blocks(name: str, tensor: Tensor) -> bool:
    return is_linear(name, tensor) and name.startswith("blocks.")


def _bf16(weights: Mapping[str, Tensor]) -> Kept:
    """With the norms in fp32, as released files are."""
    return plain(weights, torch.bfloat16, lambda name, _: "norm" not in name)


FILES: dict[str, Callable[[dict[str, Tensor]], Kept]] = {
    "bf16": _bf16,
    "fp16": lambda weights: plain(weights, torch.float16),
    "fp32": lambda weights: plain(weights, torch.float32),
    "fp8 e4m3, all tensors": lambda weights: plain(weights, E4M3),
    "fp8 e5m2, matrices": lambda weights: plain(_bf16(weights).tensors, E5M2, is_linear),
    "fp8 scaled, marked by scaled_fp8": lambda weights: scaled(_bf16(weights).tensors, "old"),
    "fp8 scaled, marked in the header": lambda weights: scaled(_bf16(weights).tensors, "header"),
    "fp8 scaled, marked by comfy_quant": lambda weights: scaled(_bf16(weights).tensors, "layer"),
    "mixed, blocks in scaled fp8": lambda weights: scaled(_bf16(weights).tensors, "header", chosen=_in_blocks),
    PATCHED: _bf16,
}
STORAGES = (*FILES, GGUF, DIFFUSERS, WAN)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stored:
    """A teacher's file or folder, the LoRA on it, and the teacher that ComfyUI makes of them: None of a GGUF without ComfyUI-GGUF."""
    path: Path
    lora: Path | None
    model: Teacher | None

    @property
    def teacher(self) -> Teacher:
        return self.model or FileTeacher(self.path, shift=8.0, device=torch.device("cpu"))

    def alone(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights as they are read without ComfyUI."""
        with open_wan(self.path) as source:
            yield from source.tensors() if self.lora is None else read_lora(self.lora, source.config).merged(source.tensors())


def stored(storage: str, folder: Path, wan: WanLiteStudent, custom_node: Path | None) -> Stored:
    """The WAN in that storage below a new folder. custom_node: ComfyUI-GGUF's."""
    folder.mkdir(parents=True)
    weights = wan.state_dict()
    if storage in (DIFFUSERS, WAN):
        path = _in_shards(folder / "shards", weights, wan.wan, diffusers=storage == DIFFUSERS)
    elif storage == GGUF:
        path = folder / f"{folder.parent.name}.gguf"            # ComfyUI-GGUF looks for the name in all folders
        write_gguf(path, weights, "Q8_0")
    else:
        path = FILES[storage](weights).save(folder / "model.safetensors")
    lora = None
    if storage == PATCHED:
        write_lora(lora := folder / "lora.safetensors", lora_for(wan.wan, seed=1, diffs=True))
    return Stored(path=path, lora=lora, model=_opened(path, lora, custom_node))


def bridge(module: str) -> Any:
    """A module of nodes/comfy_bridge, of the pack as ComfyUI imports it."""
    return pack_module(f"nodes.comfy_bridge.{module}")


def lora_for(config: WanConfig, seed: int, diffs: bool) -> Lora:
    """A random one on some layers of such a WAN; diffs: and on a norm and a bias, as speed LoRAs have them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    rows = {"blocks.0.self_attn.q": config.dim, "blocks.1.cross_attn.o": config.dim, "blocks.1.ffn.0": config.ffn_dim}
    return Lora(factors={layer: Factors(down=noise(RANK, config.dim), up=noise(count, RANK), scale=0.5) for layer, count in rows.items()},
                diffs={"blocks.0.norm3.weight": noise(config.dim), "blocks.1.ffn.2.bias": noise(config.dim)} if diffs else {})


def _opened(path: Path, lora: Path | None, custom_node: Path | None) -> Teacher | None:
    import comfy.sd
    import comfy.utils
    if path.suffix == ".gguf":
        if custom_node is None:
            return None
        model = open_with_comfyui_gguf(path, custom_node)
    else:
        model = bridge("load").open_model(path)
    if lora is not None:
        model = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(lora), safe_load=True), 1.0, 0.0)[0]
    return bridge("teacher").ComfyTeacher(model)


def _in_shards(folder: Path, weights: Mapping[str, Tensor], config: WanConfig, *, diffusers: bool) -> Path:
    """As diffusers' and Wan-Video's save_pretrained leave it: shards, an index, a config.json."""
    from huggingface_hub import save_torch_state_dict
    folder.mkdir()
    names = key_map("wan", "diffusers", config.num_layers, rows_of(config)) if diffusers else {name: name for name in weights}
    save_torch_state_dict({names[name]: tensor.bfloat16() for name, tensor in weights.items()}, folder, max_shard_size="2MB",
                          filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
    told = {"_class_name": "WanTransformer3DModel", **config.to_diffusers()} if diffusers else config.to_wan()
    (folder / "config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder
