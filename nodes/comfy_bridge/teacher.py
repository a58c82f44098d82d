"""Any ComfyUI MODEL of a WAN that makes videos of text or of pictures as a teacher."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...wanlite_model.cond import Cond
from ...wanlite_model.config import HEAD_DIM, TEXT_LEN, WanConfig, kind_of
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.flow import TIMESTEPS
from ...wanlite_model.formats import gguf_file
from ...wanlite_model.formats.keymap import wan_shapes, wan_size
from ...wanlite_model.teacher import Tap, fingerprint_tensors, tapped
from .memory import EVERYTHING, make_room
from .patches import plain_copy

PREFIX = "diffusion_model."
PLAIN = (torch.float32, torch.float16, torch.bfloat16)
# What ComfyUI calls the kinds that a student cannot be made of yet: each is told more than text and pictures.
VARIANTS = {"WAN21_Vace": "VACE", "WAN21_Camera": "Fun Camera", "WAN21_HuMo": "HuMo", "WAN22_Animate": "Animate", "WAN22_S2V": "S2V",
            "WAN21_SCAIL": "SCAIL", "WAN21_FlowRVS": "FlowRVS", "WAN22_WanDancer": "WanDancer",
            "WAN21_CausalAR": "CausalAR", "WAN21_SCAIL2": "SCAIL-2", "WAN_Animate2": "Animate 2"}
BY_CHANNELS = {48: "Fun Control", 52: "Fun Control", 32: "Fun Camera"}
SUPPORTED = {"WAN21": {(16, 16), (36, 16)}, "WAN22": {(48, 48)}}          # channels in and out


class ComfyTeacher:
    """Answers with ComfyUI's own forward, offloaded or not, LoRA patches applied; the MODEL itself is not changed.

    `left_out` says what of the MODEL it does not carry, `notes` that and what else a user should know. Raises WanLiteError when it is not a
    WAN that students can be made of, or carries something that changes what its forward means (see patches.py).
    """

    def __init__(self, model: Any) -> None:
        check_variant(model)
        self._model, notes = plain_copy(model)
        self.config = config_of(self._model.model.diffusion_model)
        self.shift = _shift(self._model)
        self.device: torch.device = self._model.load_device
        self.name = f"WAN {self.config.model_type}, {self.config.num_layers} blocks of {self.config.dim}"
        self.left_out = notes
        self.notes = (*notes, *_never_applied(self._model))
        self._reserved = 0
        self._asked: tuple[Tensor, Tensor] | None = None
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """The same for the same weights and patches in every session; another when a LoRA's strength changes."""
        if not self._fingerprint:
            with self._mode():
                tensors, numbers = _identity(self._stored())
                self._fingerprint = fingerprint_tensors(tensors, *numbers)
        return self._fingerprint

    @property
    def model(self) -> comfy.model_patcher.ModelPatcher:
        """The MODEL that is asked: the one that was given, without what `left_out` names."""
        return self._model

    def describe(self) -> str:
        """One line for a user: architecture, size, dtype, shift."""
        kinds: Counter[str] = Counter()
        for weight in self._model.model.diffusion_model.parameters():
            stored = getattr(weight, "_qdata", weight)
            kinds[getattr(_gguf_kind(weight), "name", str(stored.dtype).removeprefix("torch."))] += stored.numel() * stored.element_size()
        return (f"{self.name}, FFN {self.config.ffn_dim}, {wan_size(self.config) / 1e9:.3g} B parameters, mostly {kinds.most_common(1)[0][0]}, "
                f"{kinds.total() / 2**20:,.0f} MiB, shift {self.shift:g}.")

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, *, skip: Collection[int] = (), taps: Mapping[str, Tap] = {}) -> Tensor:
        """As the Teacher protocol says. What comes back, and what taps are given, are ordinary tensors even inside a node."""
        answers: list[Tensor] = []
        hooks = {"": lambda _, answered: answers.append(answered), **{path: _ordinary(tap) for path, tap in taps.items()}}
        told, base = self._told(x, cond), self._model.model
        with self._mode():
            self._load(x)
            self._model.pre_run()
            try:
                # The velocity is read where the network hands it on: going back from ComfyUI's x0 would divide by sigma.
                with tapped(base.diffusion_model, hooks):
                    base.apply_model(cond.placed(x).to(self.device, torch.float32), sigma.to(self.device, torch.float32),
                                     transformer_options=_options(skip), **told)
            finally:
                self._model.cleanup()
        with torch.inference_mode(False), torch.no_grad():
            return cond.answer(answers[0].to(device=x.device, dtype=torch.float32, copy=True))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Bare WAN names and CPU tensors. Plain ones keep their dtype; quantised ones come in the dtype that the forward computes in.

        Raises WanLiteError on a packed format that this ComfyUI cannot unpack.
        """
        stored = self._stored()
        for name in wan_shapes(self.config):
            with self._mode():
                baked = self._bake(name, *stored.pop(name))
                inputs = stored.get(f"{name.removesuffix('weight')}pre_quant_scale")        # NVFP4 of newer ComfyUIs: [in], on what the layer is given
                if inputs is not None:
                    baked = (baked.float() * inputs[0].to(baked.device).float()).to(baked.dtype)
            with torch.inference_mode(False), torch.no_grad():
                yielded = baked.cpu().clone().contiguous()
            del baked
            yield name, yielded

    def release(self, needed: float = EVERYTHING) -> None:
        """Has ComfyUI move models off the device until so many bytes are free there; this one comes back when it is asked again."""
        make_room(min(needed, EVERYTHING))

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """The mode of the code that loaded the model, inference mode in a node: quantised weights of one cannot be used in the other."""
        weight = self._model.model.diffusion_model.patch_embedding.weight
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            yield

    def _told(self, x: Tensor, cond: Cond) -> dict[str, Tensor]:
        """The conditions as ComfyUI's own sampling hands them to a model, from what its nodes make of pictures and texts."""
        told = {"c_crossattn": self._padded(cond.context)}
        told |= {name: value.to(self.device, torch.float32) for name, value in (("c_concat", cond.image), ("clip_fea", cond.clip_fea)) if value is not None}
        if cond.given is not None:
            frames, rows, columns = x.shape[2:]
            unknown = torch.arange(frames, device=self.device) >= cond.given.shape[2]
            told["denoise_mask"] = unknown.float().view(1, 1, -1, 1, 1).expand(len(x), 1, frames, rows, columns)
        return told

    def _padded(self, context: Tensor) -> Tensor:
        """[B, 512, 4096] on the device; kept from one call to the next, since a path asks for the same prompts at every step."""
        if self._asked is None or not (self._asked[0].shape == context.shape and torch.equal(self._asked[0], context)):
            self._asked = context, torch.nn.functional.pad(context, (0, 0, 0, TEXT_LEN - context.shape[1])).to(self.device)
        return self._asked[1]

    def _load(self, x: Tensor) -> None:
        """Has ComfyUI load the model when it is not loaded, or when this batch needs more room than was asked for."""
        needed = self._model.memory_required(list(x.shape))
        loaded = any(model is self._model for model in comfy.model_management.loaded_models())
        if not loaded or needed > self._reserved:
            comfy.model_management.load_models_gpu([self._model], memory_required=needed, minimum_memory_required=needed)
            self._reserved = needed

    def _stored(self) -> dict[str, tuple[Tensor, Callable[..., Tensor], list]]:
        """{bare name: (the tensor as stored, ComfyUI's way to unpack it, its patches)}: of the weights before any patch, and of their scales.

        Asked name by name: ComfyUI's own list of what can be patched follows state dicts, in which quantised layers name more than they hold.
        """
        model, found = self._model, {}
        skipped = set(_unpatchable(model))
        for name in dict.fromkeys((*wan_shapes(self.config), *(name for name, _ in model.model.diffusion_model.named_parameters()))):
            key = PREFIX + name
            with self._mode():
                weight, _, unpack = comfy.model_patcher.get_key_weight(model.model, key)
            if key in model.backup:
                weight = model.backup[key].weight
            if key in model.hook_backup:
                weight = model.hook_backup[key][0]
            found[name] = weight, unpack or _as_it_is, [] if key in skipped else model.patches.get(key, [])
        return found

    def _bake(self, name: str, stored: Tensor, unpack: Callable[..., Tensor], patches: list) -> Tensor:
        plain, dtype = stored, stored.dtype
        if stored.dtype not in PLAIN or type(stored) not in (Tensor, torch.nn.Parameter):
            plain, packed = _unpacked(name, stored, unpack)
            dtype = self._compute_dtype() if packed else plain.dtype
        if not patches:
            return plain.to(dtype)
        # In fp32 and rounded once, as ComfyUI's own loading does; a quantised tensor is not quantised again.
        return comfy.lora.calculate_weight(patches, plain.to(torch.float32, copy=True), PREFIX + name).to(dtype)

    def _compute_dtype(self) -> torch.dtype:
        base = self._model.model
        dtype = self._model.get_model_object("manual_cast_dtype") or base.get_dtype()
        return dtype if dtype in PLAIN else torch.float32


def check_variant(model: Any) -> None:
    """Raises WanLiteError, saying what it is, unless the MODEL is a WAN that makes videos of text or of pictures."""
    base = getattr(model, "model", None)
    kind = type(base).__name__
    found = "This MODEL is not a WAN: " + (f"ComfyUI opened it as {kind}." if isinstance(base, comfy.model_base.BaseModel)
                                           else f"it is a {type(model).__name__}.")
    if isinstance(base, comfy.model_base.WAN21):
        network = base.diffusion_model
        if (network.in_dim, network.out_dim) in SUPPORTED.get(kind, ()) and getattr(network, "ref_conv", None) is None:
            return
        variant = VARIANTS.get(kind) or (BY_CHANNELS.get(network.in_dim, f"{network.in_dim}-channel") if kind in SUPPORTED else kind)
        found = f"This MODEL is WAN {variant}, which is not supported yet."
    raise WanLiteError(found, "WanLite distils 2.1 T2V, I2V and FLF2V, the experts of 2.2 T2V-A14B and I2V-A14B, and 2.2 TI2V-5B.",
                       "Load one of these with Load Diffusion Model.")


def config_of(network: Any) -> WanConfig:
    """The architecture of ComfyUI's own module. Raises WanLiteError when it is one that no WAN has."""
    if network.num_heads * HEAD_DIM != network.dim:
        raise WanLiteError(f"This MODEL has {network.num_heads} attention heads at width {network.dim}.",
                           f"A WAN has one head for every {HEAD_DIM} of width.", "Load another WAN.")
    img_emb = network.img_emb is not None
    kind = kind_of(network.in_dim, network.out_dim, img_emb, two_images=img_emb and network.img_emb.emb_pos is not None)
    return WanConfig(model_type=kind, dim=network.dim, ffn_dim=network.ffn_dim, num_layers=network.num_layers,
                     in_dim=network.in_dim, out_dim=network.out_dim, img_emb=img_emb)


def _shift(model: Any) -> float:
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST) or getattr(sampling, "multiplier", None) != TIMESTEPS:
        raise WanLiteError(f"The teacher MODEL samples as {', '.join(c.__name__ for c in type(sampling).__mro__[1:3])}.",
                           "WAN is a rectified flow with timesteps from 0 to 1000.", "Use ModelSamplingSD3 to set its shift, or no such node.")
    return float(sampling.shift)


def _unpatchable(model: Any) -> list[str]:
    """Patched names that ComfyUI accepts and never applies: parameters of modules that hold other modules (modulation)."""
    def holds_modules(key: str) -> bool:
        parent = model.model.get_submodule(key.rpartition(".")[0])
        own = {name for name, _ in parent.named_parameters(recurse=False)}
        return any(name not in own for name, _ in parent.named_parameters())
    return [key for key in model.patches if key.startswith(PREFIX) and holds_modules(key)]


def _never_applied(model: Any) -> list[str]:
    names = [key.removeprefix(PREFIX) for key in _unpatchable(model)]
    told = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)
    return [f"ComfyUI does not apply the LoRA's change of {told}, so neither teacher nor student has it."] if names else []


def _options(skip: Collection[int]) -> dict[str, Any]:
    """New for every call: newer ComfyUIs write into it."""
    def identity(arguments: dict, _: dict) -> dict:
        return {"img": arguments["img"]}
    replaced = {("double_block", i): identity for i in skip}
    return {"cond_or_uncond": [0], "patches_replace": {"dit": replaced}} if replaced else {"cond_or_uncond": [0]}


def _ordinary(tap: Tap) -> Tap:
    """What a tap keeps may be used in training, which tensors made in inference mode cannot."""
    def called(given: Tensor, answered: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            tap(given.clone(), answered.clone())
    return called


def _as_it_is(stored: Tensor, **_: Any) -> Tensor:
    return stored


def _unpacked(name: str, stored: Tensor, unpack: Callable[..., Tensor]) -> tuple[Tensor, bool]:
    """The weight as an ordinary tensor, and whether it was stored in fewer bits than floats have."""
    kind = _gguf_kind(stored)
    if kind is not None:
        return gguf_file.unpacked(_raw(stored).cpu().numpy(), kind, tuple(stored.tensor_shape)), kind.name not in gguf_file.FLOATS
    plain = unpack(stored, inplace=False)
    if plain.dtype in (torch.uint8, torch.int8):
        raise WanLiteError(f"{name} is packed as {type(stored).__name__}, which ComfyUI cannot unpack by itself.",
                           "A student starts from its teacher's weights.", "Load the model in bf16, fp16 or fp8 instead.")
    return plain, True


def _gguf_kind(stored: Tensor) -> Any:
    """The format of one of ComfyUI-GGUF's tensors, a member of the gguf package's enumeration; None for any other tensor."""
    return getattr(stored, "tensor_type", None) if hasattr(stored, "tensor_shape") else None


def _raw(stored: Tensor) -> Tensor:
    """A tensor as it lies in memory: of ComfyUI-GGUF's, whose class tells another shape, the bytes."""
    return stored.as_subclass(Tensor)


def _identity(stored: Mapping[str, tuple[Tensor, Any, list]]) -> tuple[list[tuple[str, Tensor]], list]:
    """The tensors a fingerprint samples, and the numbers beside them."""
    tensors, told = [], []

    def add(path: str, value: Any) -> None:
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):      # ComfyUI's QuantizedTensor
            for part in value.__tensor_flatten__()[0]:
                add(path if part == "_qdata" else f"{path} {part}", getattr(value, part))
        elif isinstance(value, Tensor):
            tensors.append((path, _raw(value)))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                add(f"{path}.{i}", item)
        elif hasattr(value, "weights"):                     # a LoRA, LoHa, ... adapter
            add(f"{path}.{type(value).__name__}", value.weights)
        elif isinstance(value, (str, int, float, bool, dict, type(None))):
            told.append((path, value))
        else:
            told.append((path, getattr(value, "__qualname__", type(value).__qualname__)))

    for name, (tensor, _, patches) in sorted(stored.items()):
        add(name, tensor)
        add(f"{name} patch", patches)
    return tensors, told
