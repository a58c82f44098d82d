"""The student's constructor arguments: what each can mean in a genuine WAN, and what older configs said instead."""
from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .config import HEAD_DIM, MODEL_TYPES, MOST, PATCH, TEXT_DIM, TEXT_LEN, WanConfig, check_width
from .errors import WanLiteError
from .files import read_json

log = logging.getLogger(__name__)

LEGACY_ARGUMENTS = ("teacher_checkpoint_path", "device", "distributed", "use_gradient_checkpointing")
VAE_CHANNELS = (16, 48)                 # latent channels of WAN 2.1's and of TI2V-5B's VAE
LARGEST = {"hidden_size": MOST["dim"], "depth": MOST["num_layers"], "ffn_dim": MOST["ffn_dim"]}         # that a WAN is built of
CONFIGS = ("student_config.json", "config.json")                            # what a predecessor called its config,
WEIGHTS = ("diffusion_model.safetensors", "diffusion_pytorch_model.safetensors")        # and its weights

# What each field of a predecessor means in a genuine WAN where nothing of it has to change.
MEANINGS = {
    "model_type": "is the kind of WAN.",
    "hidden_size": "is the width.",
    "depth": "is the number of blocks.",
    "num_heads": f"is one head for every {HEAD_DIM} of width, as in every WAN.",
    "num_channels": "is the channels of the VAE's latents.",
    "image_size": "is no part of a WAN: the LATENT that is connected says the size.",
    "patch_size": "is WAN's patch.",
    "text_max_length": "is WAN's number of text tokens.",
    "text_encoder_output_dim": "is the width of WAN's text encoder.",
    "projection_factor": "asks for nothing: a WAN has no projection layer.",
    "ffn_dim": "is the width of the FFN.",
}


class Source(NamedTuple):
    """A released WAN that students are cut from."""
    name: str
    width: int
    blocks: int
    ffn_dim: int
    channels: int


SOURCES = (Source("WAN 2.1 1.3B", 1536, 30, 8960, 16), Source("WAN 2.1 14B", 5120, 40, 13824, 16), Source("WAN 2.2 TI2V-5B", 3072, 30, 14336, 48))


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A predecessor's config read as a recipe. lines: a sentence a field. config: the genuine WAN of that size, None where it is not told."""
    lines: tuple[str, ...]
    config: WanConfig | None

    def steps(self) -> str:
        """What to set in WanLite Create Student. The width is the teacher's, so depth and the FFN's share of the width are what can be had."""
        if self.config is None:
            return "Create a new student from a WAN teacher with WanLite Create Student."
        ours = self.config
        source = min((source for source in SOURCES if source.channels == ours.out_dim), key=lambda source: abs(source.width - ours.dim))
        ffn_dim = ours.ffn_dim * source.width // ours.dim
        depth = f"depth={ours.num_layers}" if ours.num_layers <= source.blocks else f"depth={source.blocks} (all it has)"
        neurons = f"ffn_dim={ffn_dim} (as many for its width)" if ffn_dim <= source.ffn_dim else f"ffn_dim={source.ffn_dim} (all it has)"
        why = "the same" if source.width == ours.dim else "the nearest, since a cut takes blocks and neurons away and never changes the width"
        return (f"Create a new student: connect {source.name}, whose width is {source.width} ({why}), to WanLite Create Student and set preset=custom, {depth}, "
                f"{neurons}.")


def check_keywords(*, model_type: str, hidden_size: int, depth: int, num_heads: int | None, num_channels: int, patch_size: Any,
                   text_max_length: int, text_encoder_output_dim: int, projection_factor: float, ffn_dim: int | None,
                   in_dim: int | None, out_dim: int | None, image_dim: int | None) -> WanConfig:
    """The WanConfig that the keyword form asks for. Raises WanLiteError on any value that a genuine WAN cannot honour."""
    check_width(hidden_size)
    rules = (
        ("num_heads", num_heads, (None, hidden_size // HEAD_DIM),
         f"ComfyUI always runs a WAN of hidden_size {hidden_size} with {hidden_size // HEAD_DIM} heads of {HEAD_DIM}"),
        ("num_channels", num_channels, VAE_CHANNELS, "WAN's latents have 16 channels, TI2V-5B's 48"),
        ("patch_size", _plain(patch_size), (None, PATCH, list(PATCH)), "a WAN's patch is (1, 2, 2): frames, rows and columns of latent"),
        ("text_max_length", text_max_length, (TEXT_LEN,), f"a WAN attends to {TEXT_LEN} text tokens, zero-padded"),
        ("text_encoder_output_dim", text_encoder_output_dim, (TEXT_DIM,), f"WAN's umt5 gives {TEXT_DIM} numbers a token"),
        ("projection_factor", projection_factor, (1, 1.0), "a genuine WAN has no projection layer"),
    )
    for name, value, allowed, why in rules:
        if value not in allowed:
            shown = " or ".join(str(a) for a in allowed if a is not None and not isinstance(a, list))
            raise WanLiteError(f"{name}={value!r} cannot be honoured: {why}.", "", f"Set {name} to {shown}, or leave it out.")
    return WanConfig(model_type=model_type, dim=hidden_size, num_layers=depth, ffn_dim=4 * hidden_size if ffn_dim is None else ffn_dim,
                     in_dim=num_channels if in_dim is None else in_dim, out_dim=num_channels if out_dim is None else out_dim,
                     img_emb=image_dim is not None)


def translate(given: Mapping[str, Any], accepted: tuple[str, ...], default_width: int) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """A predecessor's config dict -> (arguments that a genuine WAN honours, the values replaced, one sentence per replacement)."""
    fields, legacy, notes = {}, {}, []

    def replace(name: str, value: Any, why: str) -> None:
        legacy[name] = given[name]
        notes.append(f"{name}={given[name]!r} {why}")
        if value is not None:
            fields[name] = value

    for name, value in given.items():
        if name.startswith("_"):
            continue                                    # diffusers' own bookkeeping (_class_name and kin)
        if name not in accepted:
            replace(name, None, "is not a field of a WAN and was left out.")
        else:
            fields[name] = value
    if fields.get("model_type", "t2v") not in MODEL_TYPES:
        replace("model_type", "t2v", "is read as 't2v', the WAN it stands for.")
    width = fields.get("hidden_size")
    if isinstance(width, int) and 0 < width <= MOST["dim"] and width % HEAD_DIM:
        near = max(HEAD_DIM, (width + HEAD_DIM // 2) // HEAD_DIM * HEAD_DIM)
        replace("hidden_size", near, f"is read as {near}: ComfyUI opens multiples of {HEAD_DIM} only.")
    width = fields.get("hidden_size", default_width)
    if fields.get("num_heads") is not None and isinstance(width, int) and fields["num_heads"] != width // HEAD_DIM:
        replace("num_heads", width // HEAD_DIM, f"is read as {width // HEAD_DIM}: every reader splits hidden_size into heads of {HEAD_DIM}.")
    if fields.get("num_channels", 16) not in VAE_CHANNELS:
        replace("num_channels", 16, "is read as 16, the channels of WAN's VAE.")
    if _plain(fields.get("patch_size", PATCH)) != PATCH:
        replace("patch_size", PATCH, "is read as (1, 2, 2): the VAE shrinks the picture 8 times, the patch twice more.")
    for name, only in (("text_max_length", TEXT_LEN), ("text_encoder_output_dim", TEXT_DIM), ("projection_factor", 1.0)):
        if fields.get(name, only) != only:
            replace(name, only, f"is read as {only}, which every WAN has.")
    return fields, legacy, notes


def recipe_of(given: Mapping[str, Any]) -> Recipe | None:
    """What a predecessor's config asks for, field by field, in WAN's terms; None for any other config. Nothing of it is read as an error."""
    if "projection_factor" not in given or given.get("_class_name") == "WanModel":
        return None
    given = {**given, **{name: None for name in ("hidden_size", "depth") if name not in given}}
    fields, legacy, notes = translate(given, tuple(MEANINGS), SOURCES[0].width)
    unusable = {name: f"{name}={fields[name]!r} is no whole number of at least 1: no WAN can be built of it." for name in ("hidden_size", "depth", "ffn_dim")
                if name in fields and (type(fields[name]) is not int or fields[name] < 1)}
    unusable |= {name: f"{name}={fields[name]!r} is above {most}: no WAN can be built of it." for name, most in LARGEST.items()
                 if name in fields and name not in unusable and fields[name] > most}
    told = {**{name: f"{name}={value!r} {MEANINGS.get(name, '')}" for name, value in given.items()}, **dict(zip(legacy, notes)), **unusable}
    config = None
    if not unusable:
        width, channels = fields["hidden_size"], int(fields.get("num_channels", VAE_CHANNELS[0]))
        config = WanConfig(dim=width, num_layers=fields["depth"], ffn_dim=fields.get("ffn_dim", 4 * width), in_dim=channels, out_dim=channels)
    return Recipe(lines=tuple(line for name, line in told.items() if not name.startswith("_")), config=config)


def read_recipe(folder: Path) -> Recipe | None:
    """The recipe in a folder that a predecessor wrote, with weights or without; None where there is none."""
    for name in CONFIGS:
        try:
            fields = read_json(folder / name)
        except (OSError, ValueError):
            continue
        recipe = recipe_of(fields) if isinstance(fields, dict) else None
        if recipe:
            return recipe
    return None


def accepts_legacy(init: Callable[..., None]) -> Callable[..., None]:
    """Lets a constructor take a config dict first, and the four legacy arguments, before @register_to_config sees anything."""

    @functools.wraps(init)
    def wrapped(self: Any, model_type: str | Mapping[str, Any] = "t2v", *args: Any, **kwargs: Any) -> None:
        from_dict = isinstance(model_type, Mapping)
        if from_dict:
            if len(args) > len(LEGACY_ARGUMENTS):
                raise WanLiteError(f"WanLiteStudent was given a config dict and {len(args)} more arguments.",
                                   f"After the dict come {', '.join(LEGACY_ARGUMENTS)}.")
            kwargs = {**dict(zip(LEGACY_ARGUMENTS, args)), **kwargs}
        extra = {name: kwargs.pop(name) for name in LEGACY_ARGUMENTS if name in kwargs}
        legacy: dict[str, Any] = {}
        if from_dict:
            accepted = tuple(name for name in init.__wrapped__.__annotations__ if name not in ("self", "return"))
            fields, legacy, notes = translate({**model_type, **kwargs}, accepted, inspect.signature(init).parameters["hidden_size"].default)
            for note in notes:
                log.warning("WanLiteStudent: %s", note)
            init(self, **fields)
        else:
            init(self, model_type, *args, **kwargs)
        self.legacy = legacy
        _apply(self, extra)

    return wrapped


def _apply(student: Any, extra: Mapping[str, Any]) -> None:
    if extra.get("teacher_checkpoint_path"):
        log.warning("WanLiteStudent: teacher_checkpoint_path is not read by the constructor. "
                    "Build a student from a teacher with wanlite_model.compress, or load one with WanLiteStudent.from_pretrained.")
    if extra.get("distributed"):
        log.warning("WanLiteStudent: distributed has no effect on the model. Wrap it in torch's DistributedDataParallel instead.")
    if extra.get("device") is not None:
        student.to(extra["device"])
    if extra.get("use_gradient_checkpointing"):
        student.enable_gradient_checkpointing()


def _plain(patch: Any) -> Any:
    return tuple(patch) if isinstance(patch, (list, tuple)) else patch
