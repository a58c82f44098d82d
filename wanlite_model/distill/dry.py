"""A training run dry: the code that trains is run as it is, on tensors that have a shape, a dtype and a device, but no values and no memory.

They are meta tensors, on any machine: what is C++ in torch (autograd and its engine, checkpointing, optimizers) works on them as on others. What
they cannot do by themselves is done for them here: to say which device they are on, to compute as that device does, to answer what is read.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

from ..transformer import FUSED_RMS_NORM
from .live import LiveBytes, makes_storage, tensors_in

aten = torch.ops.aten
HALF_UNDER_AUTOCAST = (F.linear, F.conv3d, torch.matmul, Tensor.matmul, torch.addmm)         # and attention: of autocast's list what a WAN calls


@contextmanager
def dry_run(device_type: str) -> Iterator[LiveBytes]:
    """Inside, tensors are made dry, whatever device they are made on; yields the count of the bytes that they would take there ("meta" among them).

    device_type: what is trained on, "cuda" for instance, which need not be there. Tensors from before are real and keep their values, also
    through what is computed from them alone; together with a dry one they make a dry one. What is read from a dry tensor is True, 1.0 or 0, and
    a dry mask counts as true everywhere. A gradient stays on the device that it comes from, also where the tensor was copied from another.

    As training does, it has to run outside inference mode. One at a time in a process, and nothing else may train meanwhile.
    """
    dry = _DryBytes(device_type)
    calls = _DryCalls(dry)
    with ExitStack() as stack:
        if device_type == "cuda" and not torch.cuda.is_available():
            _stand_in_for_cuda(stack)
        stack.enter_context(patch.object(torch, "clear_autocast_cache", calls.forgetting(torch.clear_autocast_cache)))
        stack.enter_context(patch.object(saved_tensors_hooks, "__init__", calls.hooked(saved_tensors_hooks.__init__)))
        stack.enter_context(dry)
        stack.enter_context(calls)
        yield dry


def _stand_in_for_cuda(stack: ExitStack) -> None:
    """What training asks of CUDA beside tensors, where there is none."""
    idle = SimpleNamespace(wait_stream=lambda other: None)
    for owner, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False), (torch.cuda, "is_bf16_supported", lambda: True),
            (torch.cuda.Stream, "__new__", lambda cls, device=None: idle), (torch.cuda, "current_stream", lambda device=None: idle),
            (torch.cuda, "stream", nullcontext), (torch, "Generator", _Generator)):
        stack.enter_context(patch.object(owner, name, value))


class _Generator(torch.Generator):
    """One that takes any device: nobody draws from it."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)


class _DryBytes(LiveBytes):
    """Below autograd: runs operations on meta tensors, and knows of each storage which device it is said to be on."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.bound_for: str | None = None           # where the present call puts what it makes, if not beside its arguments
        self._forms: dict[Any, tuple[Any, ...]] = {}            # of answers, by the operation and the forms of its arguments

    def place(self, tensor: Tensor) -> str:
        """The type of the device that it is said to be on."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return tensor.device.type if known is None else known.device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            given = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
            dry = [tensor for tensor in given if tensor.is_meta]
            if not dry:
                answered = func(*args, **kwargs)
            elif func in ANSWERS:
                answered = ANSWERS[func](func, *args, **kwargs)
            elif len(dry) == len(given):
                answered = self._computed(func, args, kwargs, given)
            elif func._schema.is_mutable and not given[0].is_meta:
                return args[0]                      # a real one keeps its values
            else:
                answered = self._computed(func, *tree_map_only(Tensor, _dried, (args, kwargs)), given)
            place = self._place_of_answer(given) if makes_storage(func) else ""
            for tensor in tensors_in(answered):
                self._see(func, tensor, place)
            return answered

    def _place_of_answer(self, given: Sequence[Tensor]) -> str:
        if self.bound_for is not None:
            return self.bound_for
        places = {self.place(tensor) for tensor in given if tensor.ndim} or {self.place(tensor) for tensor in given}     # a number goes with any
        return self.device_type if self.device_type in places or not places else places.pop()

    def _computed(self, func: Any, args: tuple, kwargs: dict[str, Any], given: Sequence[Tensor]) -> Any:
        """What it makes of meta tensors. Many of torch's meta kernels are slow Python code, and a step asks of each block what it asked of others."""
        if not makes_storage(func) or func._schema.is_mutable:
            return func(*args, **kwargs)
        asked = func, _form(args), _form(tuple(kwargs.items()))
        if (forms := self._forms.get(asked)) is not None:
            made = tuple(map(_formed, forms))
            return made if len(made) > 1 else made[0]
        answered = func(*args, **kwargs)
        if (forms := _forms_of(answered, given)) is not None:
            self._forms[asked] = forms
        return answered


def _dried(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _form(value: Any) -> Any:
    """Equal for arguments of which an operation makes tensors of the same form."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_form, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _formed(form: tuple[Any, ...]) -> Tensor | None:
    return None if form == (type(None), None) else torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")


def _forms_of(answered: Any, given: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """The form of each tensor and of each None; None unless each tensor has memory of its own, as much as its form takes."""
    answers = (answered,) if isinstance(answered, Tensor) else answered
    if not isinstance(answers, tuple) or not all(answer is None or isinstance(answer, Tensor) for answer in answers):
        return None
    forms, made = tuple(map(_form, answers)), [*tensors_in(answers)]
    storages = {tensor.untyped_storage()._cdata for tensor in made}
    own = len(storages) == len(made) and storages.isdisjoint(tensor.untyped_storage()._cdata for tensor in given)
    whole = all(_formed(_form(tensor)).untyped_storage().nbytes() == tensor.untyped_storage().nbytes() for tensor in made)
    return forms if own and whole else None


def _read(func: Any, tensor: Tensor) -> bool | float | int:
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else getattr(tensor, "largest", 0)


def _true_places(func: Any, mask: Tensor) -> Tensor:
    """nonzero. The largest of the places is known: how many rows of a text are not zero is read from it."""
    if not mask.is_meta:
        return mask.nonzero()
    places = torch.empty(mask.numel(), mask.ndim, dtype=torch.int64, device="meta")
    places.largest = max(mask.shape, default=1) - 1
    return places


def _largest(func: Any, values: Tensor) -> Tensor:
    found = func(values)
    found.largest = getattr(values, "largest", 0)
    return found


def _indexed(func: Any, values: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """values[indices], masks among them too."""
    places = [_true_places(func, index).unbind(1) if index is not None and index.dtype == torch.bool else (index,) for index in indices]
    return func(_dried(values), [None if index is None else _dried(index) for found in places for index in found])


def _copied(func: Any, tensor: Tensor, **options: Any) -> Tensor:
    """To the CPU, in C++'s sense of it, tolist copies and nothing else: what is said to be on the CPU is a meta tensor too."""
    if options.get("device") == torch.device("cpu"):
        return torch.zeros(tensor.shape, dtype=options.get("dtype") or tensor.dtype)
    return func(tensor, **options)


ANSWERS: dict[Any, Callable[..., Any]] = {aten._local_scalar_dense.default: _read, aten.nonzero.default: _true_places, aten.max.default: _largest,
                                          aten.index.Tensor: _indexed, aten._to_copy.default: _copied}


class _DryCalls(TorchFunctionMode):
    """Above autograd: what Python code is told of tensors, and what it gets when it asks for something on a device."""

    def __init__(self, dry: _DryBytes) -> None:
        super().__init__()
        self.dry = dry
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}          # (weight, its copy in half precision) by the weight's id, as autocast keeps them
        self._makers = _device_constructors()
        self._own: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda tensor: torch.device(self.dry.place(tensor)),
            Tensor.is_cuda.__get__: self._on_cuda, Tensor.is_cpu.__get__: lambda tensor: self.dry.place(tensor) == "cpu",
            Tensor.get_device: lambda tensor: 0 if self._on_cuda(tensor) else -1,            # checkpointing asks it, to keep generators' states
            Tensor.to: self._to, Tensor.cpu: lambda tensor: self._to(tensor, "cpu"), Tensor.backward: self._backward,
            F.scaled_dot_product_attention: self._attention, F.rms_norm: self._rms_norm, F.layer_norm: self._layer_norm,
            **{func: self._in_half(func) for func in HALF_UNDER_AUTOCAST}}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if (own := self._own.get(func)) is not None:
            return own(*args, **kwargs)
        if func not in self._makers and kwargs.get("device") is None:
            return func(*args, **kwargs)
        with self._bound_for(torch.device(kwargs.get("device") or "cpu").type):
            return func(*args, **{**kwargs, "device": "meta", **({"pin_memory": False} if "pin_memory" in kwargs else {})})

    def forgetting(self, clear: Callable[[], None]) -> Callable[[], None]:
        """Of torch.clear_autocast_cache, which the outermost autocast calls at its end."""
        def cleared() -> None:
            self._casts.clear()
            clear()
        return cleared

    def hooked(self, begin: Callable[..., None]) -> Callable[..., None]:
        """Of saved_tensors_hooks: hooks are called from within operations, where a mode is off, and are Python code like other."""
        def awake(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def called(value: Any) -> Any:
                with nullcontext() if self in _get_current_function_mode_stack() else self:
                    return hook(value)
            return called

        return lambda hooks, pack_hook, unpack_hook: begin(hooks, awake(pack_hook), awake(unpack_hook))

    @contextmanager
    def _bound_for(self, place: str) -> Iterator[None]:
        before, self.dry.bound_for = self.dry.bound_for, place
        try:
            yield
        finally:
            self.dry.bound_for = before

    def _on_cuda(self, tensor: Tensor) -> bool:
        return self.dry.place(tensor) == "cuda"

    def _to(self, tensor: Tensor, *given: Any, copy: bool = False, **named: Any) -> Tensor:
        here, others = self.dry.place(tensor), [*tensors_in(given), *tensors_in(tuple(named.values()))]
        if others:
            there, dtype = self.dry.place(others[0]), others[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*given, **named)
            there = here if device is None or device.type == "meta" else device.type         # torch groups gradients by what they are: meta
        dtype = dtype or tensor.dtype
        if there == here and (tensor.is_meta or dtype == tensor.dtype and not copy):
            return tensor.to(dtype, copy=copy)
        with self._bound_for(there):
            return tensor.to("meta", dtype, copy=True)

    def _backward(self, tensor: Tensor, **_: Any) -> None:
        """Of a loss. By the engine itself: within torch.autograd.backward this mode would be off, and hooks on gradients are Python code too."""
        with self:
            torch.autograd.Variable._execution_engine.run_backward((tensor,), (torch.ones_like(tensor),), False, False, (), allow_unreachable=True,
                                                                   accumulate_grad=True)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v, attn_mask = self._cast((q, k, v, attn_mask))
        if not q.is_meta:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        if self.dry.place(q) == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask)[0]
        return _FusedAttention.apply(q, k, v, attn_mask)

    def _rms_norm(self, x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
        return _FusedRMSNorm.apply(x, weight) if FUSED_RMS_NORM and self._on_cuda(x) else F.rms_norm(x, shape, weight, eps)

    def _layer_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = self._cast((args, kwargs), torch.float32)
        return F.layer_norm(*args, **kwargs)

    def _in_half(self, func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def computed(*args: Any, **kwargs: Any) -> Tensor:
            args, kwargs = self._cast((args, kwargs))
            return func(*args, **kwargs)
        return computed

    def _cast(self, given: Any, dtype: torch.dtype | None = None) -> Any:
        """What autocast makes of the arguments of what it computes in `dtype`, or in half precision: C++ that passes over meta tensors."""
        def cast(value: Tensor) -> Tensor:
            wanted = dtype or torch.get_autocast_dtype(place)
            if value.dtype == wanted or not value.is_floating_point() or value.dtype == torch.float64:
                return value
            if dtype or not (value.is_leaf and value.requires_grad and value.dtype == torch.float32 and torch.is_autocast_cache_enabled()):
                return value.to(wanted)
            if id(value) not in self._casts:
                self._casts[id(value)] = value, value.to(wanted)
            return self._casts[id(value)][1]

        place = self.dry.place(next(tensors_in(given)))
        return tree_map_only(Tensor, cast, given) if place != "meta" and torch.is_autocast_enabled(place) else given


class _FusedAttention(torch.autograd.Function):
    """CUDA's kernels, which never have the logits: they save what they are given, what they answer and one number for each query.

    Flash attention answers in the layout of its queries; the memory-efficient kernel, which alone takes a bias or fp32, heads last. Backward sums up
    the queries' gradient in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.like = torch.empty_like if bias is None and q.dtype in (torch.float16, torch.bfloat16) else _heads_last
        answered = ctx.like(q)
        ctx.save_for_backward(q, k, v, bias, answered, q.new_empty(q.shape[:3], dtype=torch.float32))
        return answered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        summed = torch.empty_like(q, dtype=torch.float32)
        gradients = ctx.like(q), ctx.like(k), ctx.like(v)
        del summed
        return *gradients, None


def _heads_last(x: Tensor) -> Tensor:
    """A new tensor [B, heads, L, 128] that lies as [B, L, heads, 128]."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


class _FusedRMSNorm(torch.autograd.Function):
    """CUDA's kernel: it saves one number of each row beside what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty_like(x[..., :1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return tuple(torch.empty_like(value) if wanted else None for value, wanted in zip((x, weight), ctx.needs_input_grad))
