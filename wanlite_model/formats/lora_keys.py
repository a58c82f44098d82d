"""What LoRA files call a WAN's layers and the parts of their changes, in the spellings that circulate."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..config import MOST
from .keymap import ALL_ROWS, indices

STOCK = "diffusion_model."              # the one that ComfyUI's stock loader takes for all kinds of changes
PREFIXES = (STOCK, "base_model.model.", "transformer.", "model.", "unet.", "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
TEXT_ENCODERS = ("lora_te", "text_encoder")
LONGEST = 500                           # characters of a key that anyone wrote

# {a key's end: the part of the change it is}. Parts keep the names that ComfyUI knows (comfy/weight_adapter), but for a LoRA's two.
PARTS = {f"{name}{end}": part for part, names in {"down": ("lora_A", "lora_down"), "up": ("lora_B", "lora_up")}.items()
         for name in names for end in ("", ".weight", ".default", ".default.weight")}
PARTS |= {f"{name}.{part}.weight": part for name in ("lora", "lora_linear_layer") for part in ("down", "up")}
PARTS |= {name: name for name in ("alpha", "dora_scale", "diff", "diff_b", "diff_m", "set_weight", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
                                  "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "oft_blocks", "rescale",
                                  "a1.weight", "a2.weight", "b1.weight", "b2.weight")}
PARTS |= {"w_norm": "diff", "b_norm": "diff_b"}         # LyCORIS' words for a norm
ENDS = {"down": "lora_A.weight", "up": "lora_B.weight"}


def stock_key(layer: str, part: str) -> str:
    """The key of a layer's part that ComfyUI's loader takes."""
    return f"{STOCK}{layer}.{ENDS.get(part, part)}"


def layers_named(keys: Iterable[str]) -> int:
    """As many blocks as a WAN must have to have all that are named here."""
    numbers = (int(match[1]) for match in (re.search(r"blocks[._](\d{1,6})[._]", key) for key in keys) if match)
    return 1 + max((number for number in numbers if number < MOST["num_layers"]), default=-1)


def spellings(num_layers: int) -> dict[str, str]:
    """{a layer's path, or a bare tensor's, as some tool spells it: WAN's}, of any kind of WAN with so many blocks."""
    paths: dict[str, str] = {}
    for row in ALL_ROWS:
        for i in indices(row, num_layers):
            for theirs in (row.wan.format(i=i), row.diffusers.format(i=i)):
                paths[theirs] = paths[theirs.replace(".", "_")] = row.wan.format(i=i)
    return paths


def split(key: str, names: Mapping[str, str]) -> tuple[str | None, str]:
    """(WAN's layer, the part), or (None, "") for a key that is not understood. names: of `spellings`."""
    for match in re.finditer(r"\.", key) if len(key) <= LONGEST else ():
        path, part = _bare(key[:match.start()]), PARTS.get(key[match.end():], "")
        if part == "diff_m":            # some speed LoRAs have it for the modulation of this block
            path += ".modulation" if path + ".modulation" in names else "_modulation"
        if part and path in names:
            return names[path], part
    return None, ""


def _bare(path: str) -> str:
    """Without what tools put before it, one or several."""
    while (shorter := next((path.removeprefix(prefix) for prefix in PREFIXES if path.startswith(prefix)), path)) != path:
        path = shorter
    return path
