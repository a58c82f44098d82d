"""What a teacher is to the engine, and the teacher that is a module in this process."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import flow
from .cond import Cond, joined
from .config import PATCH, WanConfig
from .errors import WanLiteError
from .formats.read import open_wan
from .pinned import give_back
from .swap import lay_out
from .transformer import WanLiteStudent

Tap = Callable[[Tensor, Tensor], None]      # (what a module was given, what it answered)
SAMPLES = 64                                # numbers of each tensor that enter a fingerprint
ACTIVATIONS = 60                            # bytes for each number of a token that a forward takes at the most; in bf16 it is half of that
VISITING = 2                                # blocks are on the device at once: at work, and on its way


class Teacher(Protocol):
    """Any WAN that can answer. `fingerprint`: of its weights alone, whatever its shift. `notes`: sentences on what of the user's model was left
    out; `name`: its file name, for private folders.
    """
    config: WanConfig
    shift: float
    fingerprint: str
    name: str
    device: torch.device
    notes: tuple[str, ...]

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, *, skip: Collection[int] = (), taps: Mapping[str, Tap] = {}) -> Tensor:
        """x [B, C, T, H, W] in processed space, sigma [B] -> velocity [B, C, T, H, W] in float32 on x's device, without gradients; zero in frames
        that cond gives, whatever x holds there.

        skip: blocks taken as the identity. taps: {module path such as "blocks.3.ffn.2": called with its first input and its output}.
        """

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Bare WAN names and tensors on the CPU, one at a time: dequantised, LoRA patches baked in."""

    def release(self, needed: float = math.inf) -> None:
        """Frees what it holds on the device until it is asked again, unless `needed` bytes can be had there as it is."""


def guided_pair(teacher: Teacher, x: Tensor, sigma: Tensor, positive: Cond, negative: Cond | None) -> tuple[Tensor, Tensor | None]:
    """(v_pos, v_neg) at one state, in one forward of twice the batch; v_neg is None without a negative."""
    if negative is None:
        return teacher.velocity(x, sigma, positive), None
    both = teacher.velocity(torch.cat((x, x)), torch.cat((sigma, sigma)), joined((positive, negative)))
    return both[:len(x)], both[len(x):]


def guided_velocity(teacher: Teacher, x: Tensor, sigma: Tensor, positive: Cond, negative: Cond | None, cfg: float) -> Tensor:
    """v_w = v_neg + w (v_pos - v_neg) [B, C, T, H, W]; cfg 1 asks for v_pos alone, as ComfyUI does."""
    v_pos, v_neg = guided_pair(teacher, x, sigma, positive, negative if cfg != 1 else None)
    return v_pos if v_neg is None else flow.guided(v_neg, v_pos, cfg)


def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]], *extra: object) -> str:
    """A hash of names, shapes and strided samples: cheap at 14B, blind to paths and ids, different when any weight pattern changes.

    The order of the tensors does not matter, and of each only its sample is kept.
    """
    def sampled(name: str, tensor: Tensor) -> str:
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // SAMPLES)].float().cpu().contiguous()
        return hashlib.sha256(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + values.numpy().tobytes()).hexdigest()

    told = sorted(sampled(name, tensor) for name, tensor in tensors)
    return hashlib.sha256("".join([*told, *map(repr, extra)]).encode()).hexdigest()[:16]


@contextmanager
def tapped(module: nn.Module, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Calls each tap while the block runs; a shared model is left without hooks whatever happens."""
    handles = []
    try:
        for path, tap in taps.items():
            handles.append(module.get_submodule(path).register_forward_hook(
                lambda _, given, answered, tap=tap: tap(given[0], answered)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class ModuleTeacher:
    """A WanLiteStudent (or any WAN opened as one) as the teacher, for headless runs and tests."""

    def __init__(self, module: WanLiteStudent, *, shift: float, name: str = "module") -> None:
        self.module = module.eval()
        self.config, self.shift, self.name, self.notes = module.wan, shift, name, ()
        self.device = next(module.parameters()).device
        self.fingerprint = fingerprint_tensors(module.state_dict().items())

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, *, skip: Collection[int] = (), taps: Mapping[str, Tap] = {}) -> Tensor:
        with torch.no_grad(), tapped(self.module, taps):
            v = cond.to(self.device).asked(self.module, x.to(self.device), sigma.to(self.device), skip_blocks=skip)
        return v.to(x.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.module.state_dict().items():
            yield name, tensor.detach().cpu()

    def release(self, needed: float = math.inf) -> None:
        """Nothing: whoever made the module holds it."""


class FileTeacher:
    """A WAN file or folder as the teacher. Its module is in memory while it is asked, and only then. Raises WanLiteError when it is not a whole WAN.

    On a GPU that is too small for it, its blocks lie in CPU memory and visit.
    """

    def __init__(self, path: Path, *, shift: float, device: torch.device, name: str = "") -> None:
        with open_wan(path) as source:
            self.config, self.fingerprint = source.config, fingerprint_tensors(source.tensors())
        self.path, self.shift, self.device, self.name, self.notes = path, shift, device, name or path.name, ()
        self._opened: ModuleTeacher | None = None
        self._asked = 0                     # bytes that the largest batch so far took at work

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, *, skip: Collection[int] = (), taps: Mapping[str, Tap] = {}) -> Tensor:
        if (asked := at_work(self.config, x.shape)) > self._asked:
            self._asked = asked
            self.release(asked)
        if self._opened is None:
            self._opened = ModuleTeacher(self._module(), shift=self.shift)
        return self._opened.velocity(x, sigma, cond, skip=skip, taps=taps)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        with open_wan(self.path) as source:
            yield from source.tensors()

    def release(self, needed: float = math.inf) -> None:
        if self._opened is None or needed < math.inf and needed <= free_memory(self.device):
            return
        self._opened = None
        give_back(self.device)

    def _module(self) -> WanLiteStudent:
        with open_wan(self.path) as source, torch.inference_mode(False), torch.no_grad():
            dtype = torch.float32 if self.device.type == "cpu" else source.dtype
            module = WanLiteStudent.from_wan(self.config, "meta", dtype).requires_grad_(False).eval()
            lay_out(module, self.device, must_visit(module, free_memory(self.device) - self._asked))
            into = module.state_dict()
            for name, tensor in source.tensors():
                into[name].copy_(tensor)
        return module


def free_memory(device: torch.device) -> float:
    """Bytes that can be had on it; on a CPU, where nothing can visit from elsewhere, any number."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def at_work(config: WanConfig, shape: Sequence[int]) -> int:
    """Bytes that a forward of latents of this shape [B, C, T, H, W] takes beside the weights, at the most."""
    return math.prod(shape) // (shape[1] * math.prod(PATCH)) * ACTIVATIONS * config.dim


def must_visit(module: WanLiteStudent, room: float) -> int:
    """How many blocks must lie elsewhere, so that the weights take no more than `room` bytes."""
    whole = sum(value.numel() * value.element_size() for value in module.parameters())
    block = sum(value.numel() * value.element_size() for value in module.blocks[0].parameters())
    return 0 if whole <= room else min(len(module.blocks), math.ceil((whole + VISITING * block - room) / block))


class AbsentTeacher:
    """Stands for a teacher all of whose answers that are needed are on disk."""

    def __init__(self, config: WanConfig, *, shift: float, fingerprint: str, name: str, device: torch.device) -> None:
        self.config, self.shift, self.fingerprint, self.name, self.device, self.notes = config, shift, fingerprint, name, device, ()

    def velocity(self, *_: Any, **__: Any) -> Tensor:
        raise self._needed()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        raise self._needed()

    def release(self, needed: float = math.inf) -> None:
        """Nothing is held."""

    def _needed(self) -> WanLiteError:
        return WanLiteError(f"The teacher ({self.name}) is not there, and not all that this run asks it is in the cache.", "",
                            "Name its file with --teacher, or queue the run's graph with minutes 0: that puts the teacher into the run's folder.")
