"""Every way in which a WAN file keeps its weights, written with what each weight is then, computed beside the code that reads it."""
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2", torch.int8: "int8_tensorwise"}


@dataclass
class Kept:
    """What goes into a file (tensors, and a header's metadata), and what its weights are, in float32."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    packed: set[str] = field(default_factory=set)

    def save(self, path: Path) -> Path:
        save_file({name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}, path, self.header)
        return path


def is_linear(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2


def plain(weights: dict[str, Tensor], dtype: torch.dtype, chosen=lambda name, tensor: True) -> Kept:
    """Weights cast to a dtype, without scales; those that are not chosen stay as they are."""
    kept = Kept()
    for name, tensor in weights.items():
        kept.tensors[name] = tensor.to(dtype) if chosen(name, tensor) else tensor
        kept.weights[name] = kept.tensors[name].float()
        if chosen(name, tensor) and dtype in FORMATS:
            kept.packed.add(name)
    return kept


def scaled(weights: dict[str, Tensor], marking: str, dtype: torch.dtype = E4M3, chosen=is_linear, rows: bool = False) -> Kept:
    """Chosen layers with a scale each, or one for each row; marking: "old", "header" or "layer"."""
    kept, layers = Kept(), {}
    scale_name, input_name = (".scale_weight", ".scale_input") if marking == "old" else (".weight_scale", ".input_scale")
    for name, tensor in weights.items():
        kept.tensors[name], kept.weights[name] = tensor, tensor.float()
        if not chosen(name, tensor):
            continue
        layer = name.removesuffix(".weight")
        most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        scale = (tensor.float().abs().amax(1, keepdim=True) if rows else tensor.float().abs().max()) / most
        stored = (tensor.float() / scale).round().to(dtype) if dtype == torch.int8 else (tensor.float() / scale).to(dtype)
        kept.tensors |= {name: stored, layer + scale_name: scale, layer + input_name: torch.tensor(0.25)}
        kept.weights[name] = stored.float() * scale
        kept.packed.add(name)
        layers[layer] = {"format": FORMATS[dtype]}
    if marking == "old":
        kept.tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    if marking == "header":
        kept.header["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    if marking == "layer":
        kept.tensors |= {f"{layer}.comfy_quant": torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8) for layer, told in layers.items()}
    return kept


# --- GGUF

HALVES = {"Q4_K": (0, 2), "Q6_K": (208,)}       # where a block's own scales lie, in bytes; any other bytes of it are a weight


def gguf_data(tensor: Tensor, kind: str, seed: int = 0) -> np.ndarray:
    """Its bytes in that format. The package packs no K-quants: those are blocks of random weights."""
    import gguf
    number = gguf.GGMLQuantizationType[kind]
    if kind not in HALVES:
        return gguf.quantize(tensor.float().numpy(), number)
    _, size = gguf.GGML_QUANT_SIZES[number]
    blocks = np.random.default_rng(seed).integers(0, 256, (tensor.numel() // 256, size), dtype=np.uint8)
    for start in HALVES[kind]:
        blocks[:, start:start + 2] = np.full((len(blocks), 1), 2e-4, np.float16).view(np.uint8)
    return blocks.reshape(*tensor.shape[:-1], -1)


def by_hand(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> Tensor:
    """What those bytes are, from the format's definition (ggml-common.h): Q8_0 here, its kin by the package."""
    import gguf
    if kind == "Q8_0":                          # blocks of 32: a float16 scale and 32 whole numbers
        blocks = torch.from_numpy(data.reshape(-1, 34).copy())
        return (blocks[:, :2].contiguous().view(torch.float16).float() * blocks[:, 2:].contiguous().view(torch.int8).float()).reshape(shape)
    if kind in ("F32", "F16"):
        return torch.from_numpy(data.copy()).float().reshape(shape)
    if kind == "BF16":
        return torch.from_numpy(data.copy()).view(torch.bfloat16).float().reshape(shape)
    return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind])).reshape(shape)


def write_gguf(path: Path, weights: dict[str, Tensor], kind: str, rest: str = "F16") -> Kept:
    """As ComfyUI-GGUF's tools do: norms, biases and modulation in F32, linear layers in `kind`, what is left over in `rest`.

    Rows that fill no whole blocks lie in another shape, with their own in the header.
    """
    import gguf
    writer, kept = gguf.GGUFWriter(path, "wan"), Kept()
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for i, (name, tensor) in enumerate(weights.items()):
        its = kind if is_linear(name, tensor) else "F32" if tensor.ndim == 1 or "modulation" in name else rest
        lies = tensor
        if its == kind and tensor.shape[-1] % block:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            lies = tensor.reshape(-1, block)
        data = gguf_data(lies, its, seed=i)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[its])
        kept.weights[name] = by_hand(data, its, tuple(tensor.shape))
        if its not in ("F32", "F16", "BF16"):
            kept.packed.add(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def open_like_comfyui_gguf(path: Path):
    """A stand-in for ComfyUI-GGUF, which no package index has: a MODEL whose linear layers hold tensors with the surface of its GGMLTensor.

    Like them they are bytes that tell another shape, copy as themselves, and are unpacked as a layer runs; and the state dict of their layer
    names more than it holds. Loaded LoRAs are the real one's alone: see benchmarks/readers_gguf.py, which runs it.
    """
    import comfy.ops
    import comfy.sd
    import gguf

    class Packed(torch.Tensor):
        def __new__(cls, data, kind, shape):
            made = super().__new__(cls, data)
            made.tensor_type, made.tensor_shape = kind, torch.Size(shape)
            return made

        @property
        def shape(self):
            return getattr(self, "tensor_shape", self.size())

        def clone(self, *_, **__):
            return self

        def detach(self, *_, **__):
            return self

        def to(self, *args, **kwargs):
            moved = super().to(*args, **kwargs)
            moved.tensor_type, moved.tensor_shape = self.tensor_type, self.tensor_shape
            return moved

    class Ops(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def __init__(self, rows, columns, bias=True, device=None, dtype=None):
                torch.nn.Module.__init__(self)
                self.in_features, self.out_features, self.weight, self.bias = columns, rows, None, None

            def _load_from_state_dict(self, held, prefix, *_):
                for leaf in ("weight", "bias"):
                    setattr(self, leaf, torch.nn.Parameter(held[prefix + leaf], requires_grad=False))

            def _save_to_state_dict(self, into, prefix, keep_vars):
                super()._save_to_state_dict(into, prefix, keep_vars)
                into[f"{prefix}temp.weight"] = torch.empty(1, device="meta")

            def forward(self, x):
                weight, bias = (by_hand(held.as_subclass(torch.Tensor).numpy(), held.tensor_type.name, held.tensor_shape).to(x.dtype)
                                for held in (self.weight, self.bias))
                return torch.nn.functional.linear(x, weight, bias)

    reader = gguf.GGUFReader(path)
    shapes = {name.removeprefix("comfy.gguf.orig_shape."): told.contents() for name, told in reader.fields.items() if "orig_shape" in name}
    with torch.inference_mode():
        tensors = {tensor.name: Packed(torch.from_numpy(np.array(tensor.data)), tensor.tensor_type,
                                       shapes.get(tensor.name, tensor.shape.tolist()[::-1])) for tensor in reader.tensors}
        return comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"custom_operations": Ops})
