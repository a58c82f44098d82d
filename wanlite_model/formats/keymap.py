"""The names and shapes of every tensor in a WAN, as one table that is read both ways (WAN <-> diffusers)."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from ..config import CLIP_DIM, FLF_TOKENS, FREQ_DIM, MOST, PATCH, TEXT_DIM, WanConfig

Size = int | str                        # a number, or the name of one: see sizes()
Vocabulary = Literal["wan", "diffusers"]


class Row(NamedTuple):
    """A module's path in both vocabularies, and its tensors: {leaf: shape}."""
    wan: str
    diffusers: str
    leaves: Mapping[str, tuple[Size, ...]]


def _linear(rows: Size, *columns: Size) -> dict[str, tuple[Size, ...]]:
    return {".weight": (rows, *columns), ".bias": (rows,)}


def _norm(width: Size) -> dict[str, tuple[Size, ...]]:
    return {".weight": (width,), ".bias": (width,)}


SCALE = {".weight": ("dim",)}
SQUARE = _linear("dim", "dim")

ROWS = (
    Row("patch_embedding", "patch_embedding", _linear("dim", "in_dim", *PATCH)),
    Row("text_embedding.0", "condition_embedder.text_embedder.linear_1", _linear("dim", TEXT_DIM)),
    Row("text_embedding.2", "condition_embedder.text_embedder.linear_2", SQUARE),
    Row("time_embedding.0", "condition_embedder.time_embedder.linear_1", _linear("dim", FREQ_DIM)),
    Row("time_embedding.2", "condition_embedder.time_embedder.linear_2", SQUARE),
    Row("time_projection.1", "condition_embedder.time_proj", _linear("6 dim", "dim")),
    Row("head.head", "proj_out", _linear("patch", "dim")),
    Row("head.modulation", "scale_shift_table", {"": (1, 2, "dim")}),
    Row("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", {"": (1, 6, "dim")}),
    Row("blocks.{i}.norm3", "blocks.{i}.norm2", _norm("dim")),          # WAN's norm3 stands before cross-attention
    Row("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj", _linear("ffn_dim", "dim")),
    Row("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2", _linear("dim", "ffn_dim")),
    Row("blocks.{i}.self_attn.q", "blocks.{i}.attn1.to_q", SQUARE),
    Row("blocks.{i}.self_attn.k", "blocks.{i}.attn1.to_k", SQUARE),
    Row("blocks.{i}.self_attn.v", "blocks.{i}.attn1.to_v", SQUARE),
    Row("blocks.{i}.self_attn.o", "blocks.{i}.attn1.to_out.0", SQUARE),
    Row("blocks.{i}.self_attn.norm_q", "blocks.{i}.attn1.norm_q", SCALE),
    Row("blocks.{i}.self_attn.norm_k", "blocks.{i}.attn1.norm_k", SCALE),
    Row("blocks.{i}.cross_attn.q", "blocks.{i}.attn2.to_q", SQUARE),
    Row("blocks.{i}.cross_attn.k", "blocks.{i}.attn2.to_k", SQUARE),
    Row("blocks.{i}.cross_attn.v", "blocks.{i}.attn2.to_v", SQUARE),
    Row("blocks.{i}.cross_attn.o", "blocks.{i}.attn2.to_out.0", SQUARE),
    Row("blocks.{i}.cross_attn.norm_q", "blocks.{i}.attn2.norm_q", SCALE),
    Row("blocks.{i}.cross_attn.norm_k", "blocks.{i}.attn2.norm_k", SCALE),
)

# The CLIP branch of 2.1's image-to-video.
IMAGE_ROWS = (
    Row("img_emb.proj.0", "condition_embedder.image_embedder.norm1", _norm(CLIP_DIM)),
    Row("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", _linear(CLIP_DIM, CLIP_DIM)),
    Row("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", _linear("dim", CLIP_DIM)),
    Row("img_emb.proj.4", "condition_embedder.image_embedder.norm2", _norm("dim")),
    Row("blocks.{i}.cross_attn.k_img", "blocks.{i}.attn2.add_k_proj", SQUARE),
    Row("blocks.{i}.cross_attn.v_img", "blocks.{i}.attn2.add_v_proj", SQUARE),
    Row("blocks.{i}.cross_attn.norm_k_img", "blocks.{i}.attn2.norm_added_k", SCALE),
)
# Its first-and-last-frame variant adds one tensor.
TWO_IMAGES_ROWS = (
    Row("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed", {"": (1, FLF_TOKENS, CLIP_DIM)}),
)
ALL_ROWS = (*ROWS, *IMAGE_ROWS, *TWO_IMAGES_ROWS)


def key_map(source: Vocabulary, target: Vocabulary, num_layers: int, rows: Iterable[Row] = ROWS) -> dict[str, str]:
    """Every tensor name of `source` -> its name in `target`. The map is one to one, so swapping the two undoes it."""
    return {getattr(row, source).format(i=i) + leaf: getattr(row, target).format(i=i) + leaf
            for row in rows for i in indices(row, num_layers) for leaf in row.leaves}


def wan_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of this WAN and its shape: what a file must hold, no more and no less."""
    numbers = {"dim": config.dim, "6 dim": 6 * config.dim, "ffn_dim": config.ffn_dim, "in_dim": config.in_dim,
               "patch": PATCH[0] * PATCH[1] * PATCH[2] * config.out_dim}
    return {row.wan.format(i=i) + leaf: tuple(numbers.get(size, size) for size in shape)
            for row in rows_of(config) for i in indices(row, config.num_layers) for leaf, shape in row.leaves.items()}


def wan_size(config: WanConfig) -> int:
    """How many numbers the weights of such a WAN are."""
    return sum(map(math.prod, wan_shapes(config).values()))


def rows_of(config: WanConfig) -> tuple[Row, ...]:
    """The rows of the table that this WAN has."""
    if not config.img_emb:
        return ROWS
    return ALL_ROWS if config.model_type == "flf2v" else (*ROWS, *IMAGE_ROWS)


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these are diffusers' names (its condition_embedder is nobody else's)."""
    return any(name.startswith("condition_embedder.") for name in names)


def to_wan_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names -> WAN's. A name that diffusers' WAN does not have is kept, so that a strict reader can report it."""
    names = list(names)
    layers = 1 + max((int(found[1]) for found in (re.match(r"blocks\.(\d{1,9})\.", name) for name in names) if found), default=-1)
    known = key_map("diffusers", "wan", min(layers, MOST["num_layers"]), ALL_ROWS)
    return {name: known.get(name, name) for name in names}


def indices(row: Row, num_layers: int) -> range:
    return range(num_layers if "{i}" in row.wan else 1)
