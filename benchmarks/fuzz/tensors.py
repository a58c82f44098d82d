"""Whole files of the wrong tensors, and metadata that lies: WANs, LoRAs and prompt banks."""
from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanlite_model.formats.read import PREFIXES

from .containers import CONTAINERS, parsed, put, some_file
from .mutation import spoils
from .originals import Place
from .texts import BAD

NAMES, SHAPES, METADATA, LORA, BANK = "renamed and missing tensors", "wrong shapes and dtypes", "metadata that lies", "LoRAs", "prompt banks"
DTYPES = (torch.float64, torch.float16, torch.float32, torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
          torch.float8_e5m2, torch.uint16)
CARD = ("steps", "sampler", "scheduler", "cfg", "shift", "size", "teacher", "teacher_fingerprint", "keep", "ffn_dim", "recipe", "measured", "legacy",
        "image_size", "format")
LIES = ([], [0], [0, 1], [1, 0], [0, 0], [10**400], [2**40, 2**41], list(range(5000)), {"teacher_layers": 10**12}, {"teacher_layers": 10**400},
        {"teacher_layers": 3.5},
        {"teacher_ffn_dim": 2**80}, {"teacher_layers": True}, {"error": float("nan")}, {"error": 1e308}, {"a": {}}, {"": 1}, {"cfg": "x"}, 2**62)


def loaded(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata() or {}
    return {name: value.clone() for name, value in load_file(path).items()}, metadata


@spoils(NAMES, *CONTAINERS)
def a_name_that_is_another(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header, data = parsed(path)
    names = [name for name in header if name != "__metadata__"]
    for name in draw.sample(names, min(len(names), draw.choice((1, 1, 2)))):
        new = draw.choice((name + "_", name[:-1], name.upper(), "module." + name, "blocks.99999999999.ffn.0.weight", f"blocks.{'9' * 5000}.ffn.0.weight",
                           "blocks.-1.ffn.0.weight",
                           "blocks.٣.ffn.0.weight", "blocks.01.ffn.0.weight", "condition_embedder.x", "", "\ud800", "\0", "a\nb", "n" * 100_000,
                           "a." * 50_000, "model." * 20_000,
                           "../../x",
                           name + "\u202e", "head.modulation", "scaled_fp8", name.replace("o", "о"), "vace_blocks.0.norm.weight", f"lora_unet_{name}",
                           f"{name}.lora_A.default.weight"))
        header[new] = header.pop(name)
    put(path, header, data)


@spoils(NAMES, *CONTAINERS)
def two_names_exchanged(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header, data = parsed(path)
    one, other = (draw.choice([name for name in header if name != "__metadata__"]) for _ in range(2))
    header[one], header[other] = header[other], header[one]
    put(path, header, data)


@spoils(NAMES, *CONTAINERS)
def some_tensors_gone(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    tensors, metadata = loaded(path)
    for name in draw.sample(list(tensors), min(len(tensors), draw.choice((1, 2, len(tensors))))):
        del tensors[name]
    save_file(tensors, path, metadata)


@spoils(NAMES, *CONTAINERS)
def a_tensor_too_many(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    tensors, metadata = loaded(path)
    name = draw.choice(("x", "blocks.2.ffn.0.weight", "head.head.weight_scale", "scaled_fp8", "img_emb.emb_pos", "blocks.0.cross_attn.k_img.bias", "prompt.7",
                        "vace_patch_embedding.bias"))
    save_file({**tensors, name: torch.zeros(draw.choice(((), (0,), (2,), (128, 128))))}, path, metadata)


@spoils(NAMES, "file", "shards")
def all_names_with_a_prefix(draw: Random, place: Place) -> None:
    """One that tools write and ComfyUI knows too: it is the same WAN."""
    prefix = draw.choice([PREFIXES[i] for i in (0, 2, 3)])
    for path in place.files(".safetensors"):
        header, data = parsed(path)
        put(path, {name if name == "__metadata__" else prefix + name: value for name, value in header.items()}, data)
    place.same = True


@spoils(NAMES, *CONTAINERS)
def the_same_in_another_order(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header, data = parsed(path)
    put(path, dict(draw.sample(list(header.items()), len(header))), data)
    place.same = True


@spoils(SHAPES, *CONTAINERS)
def a_tensor_of_another_shape(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    tensors, metadata = loaded(path)
    name = draw.choice(list(tensors))
    old = tensors[name]
    ways = (old.reshape(-1), old.unsqueeze(0), old.unsqueeze(-1), old.reshape(-1)[:0], torch.zeros(()), old.transpose(0, -1) if old.ndim else old,
            torch.cat([old.reshape(-1)] * 2),
            old[:-1] if old.ndim else old, torch.zeros(0, *old.shape), torch.zeros(*old.shape[:-1], 0), torch.zeros(2, 2, 2, 2, 2, 2))
    save_file({**tensors, name: draw.choice(ways).contiguous()}, path, metadata)


@spoils(SHAPES, *CONTAINERS)
def tensors_of_another_dtype(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    tensors, metadata = loaded(path)
    dtype = draw.choice(DTYPES)
    for name in draw.sample(list(tensors), min(len(tensors), draw.choice((1, 1, 2, len(tensors))))):
        tensors[name] = tensors[name].float().to(dtype)
    save_file(tensors, path, metadata)


@spoils(SHAPES, *CONTAINERS)
def numbers_that_are_none(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    tensors, metadata = loaded(path)
    value = draw.choice([value for value in tensors.values() if value.is_floating_point()])
    value.reshape(-1)[:draw.choice((1, value.numel()))] = draw.choice((float("nan"), float("inf"), -float("inf")))
    save_file(tensors, path, metadata)


@spoils(METADATA, "file", "bank", "run", "shards", "lora")
def a_field_of_the_metadata(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header, data = parsed(path)
    metadata = header.setdefault("__metadata__", {})
    ours = sorted({*(key for key in metadata if key.startswith("wanlite.")), *(f"wanlite.{name}" for name in CARD)})
    for key in draw.sample(ours, draw.choice((1, 1, 2, 5))):
        metadata[key] = draw.choice((*(json.dumps(value) for value in (*BAD, *LIES)), "not json", "", "[" * 100_000, '{"a":' * 5000, "9" * 5000, "NaN"))
    put(path, header, data)


@spoils(METADATA, "file", "bank", "run", "lora")
def no_metadata(draw: Random, place: Place) -> None:
    path = some_file(draw, place)
    header, data = parsed(path)
    header.pop("__metadata__", None)
    put(path, header, data)
    place.same = place.kind in ("file", "lora")


@spoils(METADATA, "file", "shards", "student")
def a_lie_in_the_card(draw: Random, place: Place) -> None:
    """One field of a card that is whole otherwise."""
    path = draw.choice(place.files(".safetensors"))
    header, data = parsed(path)
    metadata = header.setdefault("__metadata__", {})
    lie = json.dumps(draw.choice(LIES))
    metadata |= {"wanlite.steps": "4", f"wanlite.{draw.choice(('keep', 'recipe', 'measured', 'size', 'steps', 'ffn_dim', 'cfg'))}": lie}
    put(path, header, data)
    if place.kind == "student":
        config = json.loads((place.path / "config.json").read_text(encoding="utf-8"))
        config["_wanlite"][draw.choice(list(config["_wanlite"]))] = json.loads(lie)
        (place.path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _layer(draw: Random, tensors: dict[str, Tensor]) -> str:
    return draw.choice([name for name in tensors if name.endswith(".lora_A.weight")]).removesuffix(".lora_A.weight")


@spoils(LORA, "lora")
def factors_of_another_rank(draw: Random, place: Place) -> None:
    tensors, metadata = loaded(place.path)
    layer = _layer(draw, tensors)
    down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    ways: tuple[dict[str, Tensor], ...] = (
        {down: tensors[down][:3]}, {up: tensors[up][:, :1]}, {down: tensors[down][:0], up: tensors[up][:, :0]}, {down: tensors[up], up: tensors[down]},
        {down: tensors[down].t(), up: tensors[up].t()}, {down: tensors[down].reshape(-1)}, {down: tensors[down][None], up: tensors[up][None]},
        {down: tensors[down][..., None, None], up: tensors[up][..., None, None]}, {down: torch.zeros(())})
    save_file({name: value.contiguous() for name, value in {**tensors, **draw.choice(ways)}.items()}, place.path, metadata)


@spoils(LORA, "lora")
def an_alpha_that_is_no_number(draw: Random, place: Place) -> None:
    tensors, metadata = loaded(place.path)
    alpha = draw.choice((torch.ones(1), torch.ones(3), torch.ones(0), torch.ones(1, 1), torch.tensor(float("nan")), torch.tensor(float("inf")),
                         torch.tensor(2), torch.tensor(True),
                         torch.tensor(1j), torch.tensor(1e38), torch.ones(4, 128), torch.tensor(2.0).to(torch.float8_e4m3fn)))
    save_file({**tensors, f"{_layer(draw, tensors)}.alpha": alpha}, place.path, metadata)


@spoils(LORA, "lora")
def a_layer_twice_or_by_half(draw: Random, place: Place) -> None:
    tensors, metadata = loaded(place.path)
    layer = _layer(draw, tensors)
    down, up, other = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", "lora_unet_" + layer.removeprefix("diffusion_model.").replace(".", "_")
    ways: tuple[dict[str, Any], ...] = (
        {f"{other}.lora_down.weight": tensors[down] * 2, f"{other}.lora_up.weight": tensors[up].clone()}, {f"{layer}.lora_down.weight": tensors[down] + 1},
        {up: None}, {down: None}, {f"{layer}.diff": torch.ones(128, 128)}, {f"{layer}.dora_scale": torch.ones(128)}, {f"{layer}.diff_m": torch.ones(1, 6, 128)},
        {f"{other}.alpha": torch.tensor(9.0)},
        {"blocks.0.norm3.diff": torch.ones(128)}, {"blocks.9.norm3.diff": torch.ones(128)}, {"diffusion_model.blocks.0.ffn.2.diff": torch.ones(3)},
        {f"{layer}.lokr_w1": torch.ones(2, 2)})
    save_file({name: value for name, value in {**tensors, **draw.choice(ways)}.items() if value is not None}, place.path, metadata)


@spoils(BANK, "bank", "run")
def embeddings_of_another_shape(draw: Random, place: Place) -> None:
    path = place.path if place.kind == "bank" else place.path / "prompts.safetensors"
    tensors, metadata = loaded(path)
    shape = draw.choice(((0, 4096), (1, 0), (), (4096,), (1, 3, 4096), (2, 3, 4096), (3, 4095), (513, 4096), (600, 4096), (0,), (1, 1, 4096)))
    filled = draw.choice((0.0, 1.0, float("nan")))
    save_file({**tensors, draw.choice(list(tensors)): torch.full(shape, filled, dtype=draw.choice((torch.float32, torch.bfloat16)))}, path, metadata)


@spoils(BANK, "bank", "run")
def another_list_of_prompts(draw: Random, place: Place) -> None:
    path = place.path if place.kind == "bank" else place.path / "prompts.safetensors"
    tensors, _ = loaded(path)
    told = {"prompts": draw.choice((["a"], ["a", "b", "c"], [], "ab", {"a": 1, "b": 2}, [1, 2], [None, "b"], [["a"], "b"], 2, None, ["a"] * 100_000,
                                    ["\ud800", "b"], ["a", "a"])),
            "negative": draw.choice(("", 5, None, [], "\0"))}
    save_file(tensors, path, {"wanlite.prompts": draw.choice((json.dumps(told), json.dumps([told]), "", "{", "[" * 100_000, "null"))})
