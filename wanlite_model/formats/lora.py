"""LoRA files for WAN: read in the spellings that circulate, written in the one that ComfyUI's stock loader takes."""
from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import WanConfig
from ..errors import WanLiteError
from ..files import regular, replace_file
from .card import StudentCard, header
from .container import NAMES, Writer
from .keymap import wan_shapes
from .lora_keys import spellings, split, stock_key
from .lora_parts import kind

log = logging.getLogger(__name__)

CHOOSE = "Choose a LoRA that was made for this WAN."


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Factors:
    """What a LoRA adds to one layer's weight: scale * up @ down; down [rank, in], up [out, rank]."""
    down: Tensor
    up: Tensor
    scale: float

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.up.shape[1] != len(self.down) or not len(self.down) or not math.isfinite(self.scale):
            raise WanLiteError(f"A LoRA has factors {list(self.down.shape)} and {list(self.up.shape)} with the scale {self.scale}.",
                               "They share a rank of at least 1, and the scale is a number.", "Download or copy the file again.")

    def delta(self) -> Tensor:
        """[out, in] in fp32."""
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lora:
    """factors: {layer such as "blocks.0.ffn.2": its factors}. diffs: {tensor name: what is added to it whole} (norms and biases)."""
    factors: Mapping[str, Factors]
    diffs: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that decides what it does, by name: what a fingerprint is made of."""
        for layer, found in self.factors.items():
            yield f"{layer}.down", found.down
            yield f"{layer}.up", found.up * found.scale
        yield from self.diffs.items()

    def merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The base's (name, tensor) with this LoRA in them; what it changes comes in fp32, so that it is rounded only where it is written."""
        for name, tensor in tensors:
            found = self.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            with torch.inference_mode(False), torch.no_grad():
                changed = tensor
                if found is not None:
                    changed = changed.float() + found.delta().to(tensor.device)
                if name in self.diffs:
                    changed = changed.float() + self.diffs[name].to(tensor.device, torch.float32)
                yield name, changed


def stacked(loras: Sequence[Lora]) -> Lora:
    """One LoRA that adds what all of these add: their ranks side by side."""
    factors: dict[str, Factors] = {}
    for layer in dict.fromkeys(layer for lora in loras for layer in lora.factors):
        parts = [lora.factors[layer] for lora in loras if layer in lora.factors]
        factors[layer] = parts[0] if len(parts) == 1 else Factors(
            down=torch.cat([part.down.float() for part in parts]), up=torch.cat([part.scale * part.up.float() for part in parts], dim=1), scale=1.0)
    diffs: dict[str, Tensor] = {}
    for lora in loras:
        for name, diff in lora.diffs.items():
            diffs[name] = diff if name not in diffs else diffs[name].float() + diff.float()
    return Lora(factors=factors, diffs=diffs)


def read_lora(path: Path, config: WanConfig) -> Lora:
    """A LoRA file for a WAN of this architecture, without what it changes of modulation. Raises WanLiteError on another model's LoRA, and on
    keys that are not understood.
    """
    try:
        with safe_open(regular(path), "pt") as stored:
            found = {key: stored.get_tensor(key) for key in stored.keys()}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WanLiteError(f"{path.name} is not a whole safetensors file ({error}).", "", "Download or copy the file again.") from error
    shapes = wan_shapes(config)
    names = spellings(config.num_layers)
    parts: dict[str, dict[str, Tensor]] = {}
    diffs: dict[str, Tensor] = {}
    strange: list[str] = []
    frozen: list[str] = []          # ComfyUI's loader passes over them too, so a student with them would not be what it samples
    for key, tensor in found.items():
        layer, leaf = split(key, names)
        if tensor.dtype not in NAMES or not tensor.is_floating_point() and leaf != "alpha":
            raise WanLiteError(f"{path.name} changes {key} by {str(tensor.dtype)[6:]} values.", "A LoRA's are floating-point numbers.", CHOOSE)
        if layer in shapes and layer.endswith("modulation"):
            frozen.append(layer)
        elif f"{layer}.weight" not in shapes:
            strange.append(key)
        elif leaf in ("diff", "diff_b"):
            name = layer + (".weight" if leaf == "diff" else ".bias")
            if shapes.get(name) != tuple(tensor.shape):
                raise _other(path, key, tensor, shapes.get(name))
            if name in diffs:
                raise _twice(path, name)
            diffs[name] = tensor
        elif leaf in parts.setdefault(layer, {}):
            raise _twice(path, layer)
        else:
            parts[layer][leaf] = tensor
    if frozen:
        log.info("WanLite: %s changes %s and %d more, which ComfyUI does not apply and WanLite leaves out.", path.name, frozen[0], len(frozen) - 1)
    factors = {layer: _factors(path, layer, part, shapes[f"{layer}.weight"]) for layer, part in parts.items()}
    if strange or not (factors or diffs):
        told = f"It changes {strange[0]!r} and {len(strange) - 1} more, which such a WAN does not have." if strange else "It changes nothing."
        raise WanLiteError(f"{path.name} is no LoRA for a WAN of {config.num_layers} blocks of {config.dim}.", told, CHOOSE)
    return Lora(factors=factors, diffs=diffs)


def write_lora(path: Path, lora: Lora, *, dtype: torch.dtype = torch.bfloat16, card: StudentCard | None = None) -> int:
    """Writes the file under the keys that ComfyUI's loader takes, at once; returns its bytes. The scale travels as alpha (alpha / rank)."""
    tensors: dict[str, Tensor] = {}
    for layer, found in lora.factors.items():
        parts = {"down": found.down, "up": found.up, "alpha": torch.tensor(found.scale * len(found.down))}
        tensors |= {stock_key(layer, part): value for part, value in parts.items()}
    for name, diff in lora.diffs.items():
        layer, _, leaf = name.rpartition(".")
        tensors[stock_key(layer, "diff_b" if leaf == "bias" else "diff")] = diff
    metadata = {"format": "pt", **(card.to_metadata() if card else header({"lora": True}))}

    def write(temporary: Path) -> None:
        with Writer(temporary, {name: tuple(value.shape) for name, value in tensors.items()}, metadata) as writer:
            for name, value in tensors.items():
                writer.write(name, value, torch.float32 if name.endswith(".alpha") else dtype)
            writer.finish()
    replace_file(path, write)
    return path.stat().st_size


def _factors(path: Path, layer: str, part: Mapping[str, Tensor], shape: tuple[int, ...]) -> Factors:
    found = kind(part)
    if found is None:
        raise WanLiteError(f"{path.name} has only a part of its change of {layer}.", "", "Download or copy the file again.")
    if found != "LoRA" or "set_weight" in part:
        raise WanLiteError(f"{path.name} changes {layer} as a {found or 'replacement'}.", "What is trained on are the two factors of a plain LoRA.",
                           "Choose another LoRA, or put this one on the teacher with ComfyUI's LoRA loader.")
    down, up = part["down"], part["up"]
    if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0] or not len(down):
        raise _other(path, layer, up, shape)
    if "alpha" not in part:
        return Factors(down=down, up=up, scale=1.0)
    alpha = part["alpha"]
    if alpha.numel() != 1 or not math.isfinite(alpha):
        raise WanLiteError(f"{path.name} has an alpha of {layer} that is no number.", "", "Download or copy the file again.")
    return Factors(down=down, up=up, scale=float(alpha) / len(down))


def _twice(path: Path, name: str) -> WanLiteError:
    return WanLiteError(f"{path.name} changes {name} twice, under two names.", "Nothing tells which of the two is meant.", CHOOSE)


def _other(path: Path, key: str, tensor: Tensor, expected: tuple[int, ...] | None) -> WanLiteError:
    return WanLiteError(f"{path.name} changes {key} by {list(tensor.shape)}.",
                        f"This WAN has {list(expected)} there." if expected else "This WAN has no such tensor.", CHOOSE)
