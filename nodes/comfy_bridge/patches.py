"""Which of the things that other nodes hang on a MODEL a teacher honours, leaves out, or refuses.

A student learns what the weights say. So: weight patches (LoRA) and the sampling shift are honoured; what only makes the same
answer faster, or acts on the sampler and not on a forward, is left out with a sentence; what changes what a forward means is refused
by name, because the student would silently be made from something else.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import comfy.model_patcher

from ...wanlite_model.errors import WanLiteError

CACHE = "answers some steps from memory, while WanLite asks the model itself every time"
COMPILED = "only makes the same forward faster"
GUIDANCE = "changes how the positive and the negative answer are combined; WanLite combines them by plain guidance"
SAMPLER = "acts on the sampler, and WanLite takes its own steps"
GPUS = "only shares the sampling among GPUs; WanLite asks one"


class Found(NamedTuple):
    """One thing on a MODEL. `kind` and `name` are looked up below; `told` is what the user reads."""
    kind: str
    name: str
    told: str


# Wrapper types that stand around the sampler; the other types stand around a forward.
SAMPLER_WRAPPERS = ("outer_sample", "prepare_sampling", "sampler_sample", "predict_noise", "calc_cond_batch")
# Callbacks that ComfyUI calls outside a forward and outside loading: they cannot change an answer.
QUIET_CALLBACKS = ("on_clone", "on_detach_after", "on_cleanup", "on_pre_run", "on_prepare_state", "on_apply_hooks",
                   "on_register_all_hook_patches", "on_eject_model", "on_deepclone_multigpu", "on_match_multigpu_clones")
# What a sampler leaves in transformer_options for itself.
BOOKKEEPING = ("sample_sigmas", "sigmas", "uuids", "cond_or_uncond")

HONOURED = {("object", "model_sampling"), ("object", "manual_cast_dtype")}
LEFT_OUT = {
    ("wrapper", "easycache"): ("EasyCache", CACHE),
    ("wrapper", "lazycache"): ("LazyCache", CACHE),
    ("wrapper", "torch.compile"): ("torch.compile", COMPILED),
    ("object", "compiled"): ("torch.compile", COMPILED),
    ("option", "torch_compile_kwargs"): ("torch.compile", COMPILED),
    ("option", "sampler_cfg_function"): ("a cfg function", GUIDANCE),
    ("option", "sampler_pre_cfg_function"): ("a pre-cfg function", GUIDANCE),
    ("option", "sampler_post_cfg_function"): ("a post-cfg function (SLG, RescaleCFG and the like)", GUIDANCE),
    ("option", "sampler_calc_cond_batch_function"): ("a cond-batch function (simple SLG and the like)", GUIDANCE),
    ("option", "disable_cfg1_optimization"): ("the switch that keeps the negative pass at cfg 1", GUIDANCE),
    ("option", "denoise_mask_function"): ("differential diffusion", SAMPLER),
    ("option", "context_handler"): ("context windows", "cut long clips in parts; WanLite asks for the whole clip of the LATENT's size"),
    ("transformer option", "easycache"): ("EasyCache", CACHE),
    ("additional model", "multigpu"): ("MultiGPU CFG Split", GPUS),
    ("option", "multigpu_options"): ("MultiGPU CFG Split", GPUS),
    ("hook", "registered"): ("hooks on CONDITIONING", SAMPLER),
    ("wrapper", "sampler"): ("", SAMPLER),
}


def plain_copy(model: Any) -> tuple[comfy.model_patcher.ModelPatcher, tuple[str, ...]]:
    """A clone that carries only what a teacher honours, and a sentence on each thing it does not carry.

    The clone shares its weights with `model`, which is not changed. Raises WanLiteError, by name, on what is refused.
    """
    kept, left_out = set(), {}
    for found in _everything_on(model):
        key = (found.kind, found.name)
        if key in HONOURED:
            kept.add(found.name)
        elif key in LEFT_OUT:
            what, why = LEFT_OUT[key]
            left_out[what or found.told] = why
        else:
            raise WanLiteError(f"The teacher MODEL carries {found.told}, which changes what its forward means.",
                               "A student is made from the weights, and would not have it.",
                               "Connect the MODEL as it was before the node that added this.")
    copy = model.clone()
    copy.object_patches = {name: value for name, value in copy.object_patches.items() if name in kept}
    copy.model_options = {"transformer_options": {}}
    copy.wrappers, copy.callbacks, copy.hook_patches, copy.additional_models = {}, {}, {}, {}
    return copy, tuple(f"Left out of the teacher: {what} ({why})." for what, why in left_out.items())


def _everything_on(model: Any) -> Iterator[Found]:
    options = dict(model.model_options)
    inner = dict(options.pop("transformer_options", {}))
    for wrappers in (model.wrappers, inner.pop("wrappers", {})):
        yield from _wrappers(wrappers)
    for callbacks in (model.callbacks, inner.pop("callbacks", {})):
        for kind, keyed in callbacks.items():
            if kind not in QUIET_CALLBACKS and any(keyed.values()):
                yield Found("callback", kind, f"a callback for {kind} ({', '.join(map(str, keyed))})")
    yield from (Found("option", name, f"the model option '{name}'{_named(value)}") for name, value in options.items())
    yield from _transformer_options(inner)
    for name, value in model.object_patches.items():
        compiled = hasattr(value, "_orig_mod")              # torch.compile's OptimizedModule
        yield Found("object", "compiled" if compiled else name, f"a replaced '{name}'{_named(value)}")
    yield from _rest(model)


def _wrappers(wrappers: dict[str, dict[Any, list]]) -> Iterator[Found]:
    for kind, keyed in wrappers.items():
        for key, functions in keyed.items():
            if functions:
                around_sampler = kind in SAMPLER_WRAPPERS and ("wrapper", key) not in LEFT_OUT
                told = f"a {kind} wrapper '{key or ''}'{_named(functions[0])}"
                yield Found("wrapper", "sampler" if around_sampler else str(key), told)


def _transformer_options(options: dict[str, Any]) -> Iterator[Found]:
    for name, value in options.items():
        if name in BOOKKEEPING or (isinstance(value, (dict, list)) and not value):
            continue
        inside = f" ({', '.join(map(str, value))})" if isinstance(value, dict) else ""
        yield Found("transformer option", name, f"'{name}'{inside or _named(value)}")


def _rest(model: Any) -> Iterator[Found]:
    for name in getattr(model, "weight_wrapper_patches", {}):
        yield Found("weight wrapper", name, f"a weight wrapper on '{name}'")
    for name, injections in getattr(model, "injections", {}).items():
        if injections:
            yield Found("injection", name, f"the injection '{name}' (a LoRA in bypass mode, for instance)")
    for name, models in getattr(model, "additional_models", {}).items():
        if models:
            yield Found("additional model", name, f"the additional model '{name}'")
    if getattr(model, "forced_hooks", None):
        yield Found("hook", "forced", "forced hooks")
    if getattr(model, "hook_patches", None):                # stay on a MODEL after a sampler ran with them
        yield Found("hook", "registered", "hooks")


def _named(value: Any) -> str:
    """Who made it, as far as Python knows."""
    name = getattr(value, "__qualname__", None) or (type(value).__qualname__ if hasattr(value, "__dict__") else "")
    return f" ({name})" if name else ""
