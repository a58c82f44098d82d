"""LoRA (Hu et al. 2021) over a frozen WAN: y = W x + (alpha / rank) B A x on its linear layers.

The adapters hang on the layers as hooks, so the network's own modules, names and tensors stay what they are: with the adapters off it
is the unchanged base, and no second copy of it is needed to ask it. Modulation has no adapter: ComfyUI accepts one and never applies it.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WanConfig
from ..errors import WanLiteError
from ..formats.keymap import wan_shapes
from ..formats.lora import Factors
from ..teacher import ModuleTeacher, Teacher
from ..transformer import WanLiteStudent


class Adapters:
    """Low-rank factors on layers of `module`, trainable. parameters: {"<layer>.lora_A.weight" or "...lora_B.weight": tensor}."""

    def __init__(self, module: WanLiteStudent, factors: Mapping[str, Factors], diffs: Mapping[str, Tensor] = {}, enabled: bool = True) -> None:
        """diffs: what else the LoRA adds, {tensor name: tensor}; it is in the module's weights already, is not trained, and is written with it."""
        self.diffs = dict(diffs)
        self.parameters: dict[str, nn.Parameter] = {}
        self.scales: dict[str, float] = {}
        self.enabled = enabled
        layers, device = dict(module.named_modules()), next(module.parameters()).device         # a layer's own may be that of its home
        for path, found in factors.items():
            layer = layers.get(path)
            if not isinstance(layer, nn.Linear) or (found.down.shape[1], found.up.shape[0]) != (layer.in_features, layer.out_features):
                raise WanLiteError(f"The LoRA changes {path} by {list(found.up.shape)} x {list(found.down.shape)}.",
                                   f"This WAN has {'no such layer' if layer is None else f'{layer} there'}.", "Choose a LoRA for this WAN.")
            for leaf, value in (("lora_A", found.down), ("lora_B", found.up)):
                self.parameters[f"{path}.{leaf}.weight"] = nn.Parameter(value.to(device, torch.float32, copy=True))
            self.scales[path] = found.scale
            layer.register_forward_hook(self._hook(path))

    def _hook(self, path: str):
        a, b, scale = self.parameters[f"{path}.lora_A.weight"], self.parameters[f"{path}.lora_B.weight"], self.scales[path]

        def add(_: nn.Module, given: tuple[Tensor, ...], answered: Tensor) -> Tensor | None:
            if not self.enabled:
                return None
            with _computing_in(answered.dtype, answered.device.type):
                down = F.linear(given[0].flatten(0, -2).to(answered.dtype), a)                      # [B N, rank]
                return torch.addmm(answered.flatten(0, -2), down, b.mT, alpha=scale).view_as(answered)
        return add

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Inside, they count, or the module is its base. A backward pass belongs inside too: checkpointed blocks are computed again by it."""
        before, self.enabled = self.enabled, on
        try:
            yield
        finally:
            self.enabled = before

    @property
    def rank(self) -> int:
        """The largest of them."""
        return max(len(value) for name, value in self.parameters.items() if name.endswith(".lora_A.weight"))

    def factors(self, parameters: Mapping[str, Tensor]) -> dict[str, Factors]:
        """The factors by layer, from tensors under the names of `parameters`."""
        return {path: Factors(down=parameters[f"{path}.lora_A.weight"], up=parameters[f"{path}.lora_B.weight"], scale=scale)
                for path, scale in self.scales.items()}


class BaseTeacher(ModuleTeacher):
    """The frozen base of a student that starts as its teacher: with the adapters off it is the teacher, and no second copy is needed."""

    def __init__(self, module: WanLiteStudent, adapters: Sequence[Adapters], teacher: Teacher) -> None:
        self.module, self.adapters = module, tuple(adapters)
        self.config, self.shift, self.name, self.notes = teacher.config, teacher.shift, teacher.name, teacher.notes
        self.device, self.fingerprint = next(module.parameters()).device, teacher.fingerprint

    def velocity(self, *state: Any, **asked: Any) -> Tensor:
        with ExitStack() as stack:
            for adapters in self.adapters:
                stack.enter_context(adapters.switched(False))
            # As the student is run: what the two differ in must not be rounding.
            stack.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"))
            return super().velocity(*state, **asked)


def _computing_in(dtype: torch.dtype, device_type: str) -> AbstractContextManager:
    """Autocast to `dtype`, or what there is where that is the same: there are hundreds of layers, and each autocast costs the CPU some time."""
    wanted, enabled = dtype != torch.float32, torch.is_autocast_enabled(device_type)
    if wanted == enabled and (not enabled or dtype == torch.get_autocast_dtype(device_type)):
        return nullcontext()
    return torch.autocast(device_type, enabled=wanted, dtype=dtype)


def adapter_size(config: WanConfig, rank: int) -> int:
    """Parameters of such adapters on a WAN of this architecture."""
    return sum(rank * sum(shape) for name, shape in wan_shapes(config).items() if _adapted(name) and name.endswith(".weight") and len(shape) == 2)


def fresh_factors(module: WanLiteStudent, rank: int, generator: torch.Generator) -> dict[str, Factors]:
    """Factors of this rank: A drawn as nn.Linear draws its weights, B zero, scale 1."""
    return {path: Factors(down=(torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) / math.sqrt(layer.in_features),
                          up=torch.zeros(layer.out_features, rank), scale=1.0)
            for path, layer in module.named_modules() if _adapted(path) and isinstance(layer, nn.Linear)}


def _adapted(path: str) -> bool:
    """The blocks, and what tells them the noise level: folding guidance in is stronger at some levels than at others."""
    return path.startswith(("blocks.", "time_embedding.", "time_projection.", "head."))
