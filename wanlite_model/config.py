"""What a WAN is made of, and the one table of what its numbers are called in each vocabulary."""
from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from .errors import WanLiteError
from .kinds import check_kinds

HEAD_DIM = 128                          # ComfyUI reads num_heads as dim // 128 and nothing else (comfy/model_detection.py)
TEXT_DIM, TEXT_LEN, FREQ_DIM, EPS = 4096, 512, 256, 1e-6
PATCH = (1, 2, 2)                       # frames, rows, columns of latent in a token
CLIP_DIM = 1280                         # width of the CLIP vision features that 2.1's image-to-video reads
FLF_TOKENS = 514                        # CLIP tokens of a first and a last frame
MODEL_TYPES = ("t2v", "i2v", "flf2v", "ti2v")
# Far beyond every WAN, and small enough that its tensors can be named and their sizes calculated.
MOST = {"dim": 2**16, "ffn_dim": 2**20, "num_layers": 1000, "in_dim": 2**16, "out_dim": 2**16}

WANLITE_FIELDS = ("model_type", "hidden_size", "depth", "num_heads", "num_channels", "image_size", "patch_size",
                  "text_max_length", "text_encoder_output_dim", "projection_factor")


class Name(NamedTuple):
    """One number under its three names; an empty string where a vocabulary has no word for it."""
    wan: str
    diffusers: str
    wanlite: str


# Where two vocabularies share a word they mean the same number, so one config.json serves all readers.
NAMES = {
    "num_layers": Name("num_layers", "num_layers", "depth"),
    "num_heads": Name("num_heads", "num_attention_heads", "num_heads"),
    "dim": Name("dim", "", "hidden_size"),
    "ffn_dim": Name("ffn_dim", "ffn_dim", "ffn_dim"),
    "in_dim": Name("in_dim", "in_channels", "in_dim"),
    "out_dim": Name("out_dim", "out_channels", "out_dim"),
    "freq_dim": Name("freq_dim", "freq_dim", ""),
    "text_dim": Name("text_dim", "text_dim", "text_encoder_output_dim"),
    "text_len": Name("text_len", "", "text_max_length"),
    "eps": Name("eps", "eps", ""),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WanConfig:
    """The architecture of a genuine WAN. Whatever ComfyUI cannot read from the weights is a constant above, not a field.

    `img_emb`: has the CLIP image branch (2.1 I2V and FLF2V; 2.2's I2V-A14B has none). Raises WanLiteError on values no WAN has.
    """
    model_type: str = "t2v"
    dim: int
    ffn_dim: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    img_emb: bool = False

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise WanLiteError(f"model_type is {self.model_type!r}.", f"WanLite knows {', '.join(MODEL_TYPES)}.",
                               "Use one of these names.")
        check_width(self.dim)
        check_kinds(self)
        for name in ("ffn_dim", "num_layers", "in_dim", "out_dim"):
            if not 1 <= getattr(self, name) <= MOST[name]:
                raise WanLiteError(f"{name} is {getattr(self, name)}.", f"It must lie between 1 and {MOST[name]}.")

    @property
    def num_heads(self) -> int:
        return self.dim // HEAD_DIM

    def resized(self, *, num_layers: int, ffn_dim: int) -> WanConfig:
        """The same WAN with another depth and FFN width."""
        return replace(self, num_layers=num_layers, ffn_dim=ffn_dim)

    def to_wan(self) -> dict[str, Any]:
        """The fields of Wan-Video's own config.json. Its 2.1 and 2.2 classes build an img_emb from model_type "i2v"/"flf2v" alone."""
        values = self._values()
        named = {NAMES[key].wan: values[key] for key in
                 ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")}
        return {"_class_name": "WanModel", "model_type": self.model_type, **named}

    def to_diffusers(self) -> dict[str, Any]:
        """The fields of diffusers' WanTransformer3DModel (qk_norm left to its default: a hybrid file must omit it)."""
        values = self._values()
        named = {name.diffusers: values[key] for key, name in NAMES.items() if name.diffusers}
        image = {"image_dim": CLIP_DIM, "added_kv_proj_dim": self.dim} if self.img_emb else {}
        two = {"pos_embed_seq_len": FLF_TOKENS} if self.img_emb and self.model_type == "flf2v" else {}
        return {**named, "attention_head_dim": HEAD_DIM, "patch_size": list(PATCH), "cross_attn_norm": True, **image, **two}

    def to_wanlite(self) -> dict[str, Any]:
        """The keyword arguments that build this WAN as a WanLiteStudent."""
        values = self._values()
        named = {name.wanlite: values[key] for key, name in NAMES.items() if name.wanlite}
        image = {"image_dim": CLIP_DIM} if self.img_emb else {}
        return {"model_type": self.model_type, "num_channels": self.out_dim, "patch_size": list(PATCH), "projection_factor": 1.0,
                **named, **image}

    def to_json(self) -> dict[str, Any]:
        """One dict that all readers take: the union of the three vocabularies."""
        return {**self.to_wanlite(), **self.to_diffusers(), **self.to_wan()}

    def _values(self) -> dict[str, Any]:
        own = {key: value for key, value in asdict(self).items() if key in NAMES}
        return {**own, "num_heads": self.num_heads, "freq_dim": FREQ_DIM, "text_dim": TEXT_DIM, "text_len": TEXT_LEN, "eps": EPS}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> WanConfig:
        """Reads a config.json in WAN's, diffusers' or WanLite's names, or their union.

        Raises WanLiteError where two names of one number disagree, where one is missing, or where a value cannot be a WAN's.
        """
        if not isinstance(fields, Mapping):
            raise WanLiteError("The config has no fields.", "A WAN config names its width and its depth.", "Choose the config.json that stands beside the weights.")
        values = {key: _agreed({name: fields.get(name) for name in names if name}) for key, names in NAMES.items()}
        if values["num_heads"] is not None and fields.get("attention_head_dim") is not None:
            heads, width = values["num_heads"], fields["attention_head_dim"]
            sizes = range(MOST["dim"] + 1)
            product = heads * width if heads in sizes and width in sizes else f"{heads} * {width}"
            values["dim"] = _agreed({"hidden_size": values["dim"], "num_attention_heads * attention_head_dim": product})
        values["out_dim"] = _agreed({"out_dim": values["out_dim"], "num_channels": fields.get("num_channels")})
        values["out_dim"] = 16 if values["out_dim"] is None else values["out_dim"]
        values["in_dim"] = values["out_dim"] if values["in_dim"] is None else values["in_dim"]
        missing = [NAMES[key].wanlite for key in ("dim", "num_layers") if values[key] is None]
        if missing:
            raise WanLiteError(f"The config has no {' and no '.join(missing)}.", "A WAN config names its width and its depth.",
                               "Choose the config.json that stands beside the weights.")
        check_width(values["dim"])
        if values["ffn_dim"] is None:
            values["ffn_dim"] = 4 * values["dim"]
        _check_constants(values, fields.get("patch_size"))
        return cls(**{key: values[key] for key in ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim")},
                   **_variant(fields, values["in_dim"], values["out_dim"]))

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], model_type: str | None = None) -> WanConfig:
        """Reads the architecture off bare WAN tensor names and shapes, as ComfyUI does.

        Raises WanLiteError when a tensor that decides the architecture is missing.
        """
        needed = {"head.modulation": 3, "head.head.weight": 2, "patch_embedding.weight": 5, "blocks.0.ffn.0.weight": 2}
        for name, ndim in needed.items():
            if name not in shapes or len(shapes[name]) != ndim:
                told = f"has shape {list(shapes[name])}" if name in shapes else f"is missing and {len(shapes)} other tensors are there"
                raise WanLiteError(f"{name!r} {told}.", f"Every WAN 2.1 or 2.2 has it, with {ndim} axes.", "Choose a WAN model file.")
        in_dim, img_emb = shapes["patch_embedding.weight"][1], "img_emb.proj.0.bias" in shapes
        out_dim = shapes["head.head.weight"][0] // math.prod(PATCH)
        guessed = kind_of(in_dim, out_dim, img_emb, two_images="img_emb.emb_pos" in shapes)
        return cls(model_type=model_type or guessed, dim=shapes["head.modulation"][-1], ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
                   num_layers=count_blocks(shapes), in_dim=in_dim, out_dim=out_dim, img_emb=img_emb)


def check_width(dim: Any) -> None:
    """Raises WanLiteError unless `dim` is a width that every reader of WAN can open."""
    if isinstance(dim, bool) or not isinstance(dim, int) or not HEAD_DIM <= dim <= MOST["dim"] or dim % HEAD_DIM:
        number = isinstance(dim, (int, float)) and HEAD_DIM <= dim <= MOST["dim"]
        near = int(dim) // HEAD_DIM * HEAD_DIM if number else HEAD_DIM
        raise WanLiteError(f"hidden_size {dim!r} cannot work in ComfyUI, which uses hidden_size // {HEAD_DIM} attention heads.",
                           f"It must be a multiple of {HEAD_DIM}, {MOST['dim']} at the most.", f"Set it to {near} or {near + HEAD_DIM}.")


def video_size(shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Width and height in pixels, and frames, of the videos behind latents of (C, T, H, W)."""
    channels, frames, rows, columns = shape
    scale = 16 if channels == 48 else 8                     # pixels a latent pixel: TI2V-5B's VAE, and the others'
    return columns * scale, rows * scale, 4 * (frames - 1) + 1


def count_blocks(names: Mapping[str, Any]) -> int:
    """The number of blocks, counted from 0 without a gap, as ComfyUI counts them."""
    present = {int(match[1]) for match in (re.match(r"blocks\.(\d{1,9})\.", name) for name in names) if match}
    return next(i for i in range(len(present) + 1) if i not in present)


def _agreed(named: Mapping[str, Any]) -> Any:
    """The value that all names of one number give, None where none does; disagreement is an error."""
    found = [(name, value) for name, value in named.items() if value is not None]
    if any(value != found[0][1] for _, value in found[1:]):
        raise WanLiteError(f"The config contradicts itself: {' and '.join(f'{name}={value}' for name, value in found)}.",
                           "These are names of one number.", "Correct the one that does not match the weights.")
    return found[0][1] if found else None


def kind_of(in_dim: int, out_dim: int, img_emb: bool, two_images: bool) -> str:
    """What a WAN of these channels is for. 2.2's I2V has 36 channels in and no CLIP branch; TI2V-5B's VAE has 48."""
    return "flf2v" if two_images else "i2v" if img_emb or in_dim == 36 else "ti2v" if out_dim == 48 else "t2v"


def _variant(fields: Mapping[str, Any], in_dim: int, out_dim: int) -> dict[str, Any]:
    """The kind of WAN, and whether it has the CLIP branch. Wan-Video's config tells the second by model_type alone, and for 2.2 wrongly."""
    model_type, img_emb = fields.get("model_type"), fields.get("image_dim") is not None
    if fields.get("_class_name") == "WanModel" and "in_channels" not in fields:
        img_emb = model_type in ("i2v", "flf2v")
    if model_type in (None, "WanLiteStudent", "wan"):
        model_type = kind_of(in_dim, out_dim, img_emb, two_images=fields.get("pos_embed_seq_len") is not None)
    return {"model_type": model_type, "img_emb": img_emb}


def _check_constants(values: Mapping[str, Any], patch: Any) -> None:
    fixed = {"num_heads": values["dim"] // HEAD_DIM, "text_dim": TEXT_DIM, "text_len": TEXT_LEN, "freq_dim": FREQ_DIM, "eps": EPS}
    found = {**{NAMES[key].wanlite or key: (values[key], expected) for key, expected in fixed.items()},
             "patch_size": (tuple(patch) if isinstance(patch, list) else patch, PATCH)}
    for name, (value, expected) in found.items():
        if value is not None and value != expected:
            raise WanLiteError(f"The config says {name}={value}.",
                               f"A WAN of hidden_size {values['dim']} has {expected}; every reader assumes it.",
                               f"Set it to {expected}, or leave it out.")
