"""README.md beside a saved student: a model card as Hugging Face reads it, made from what is known and nothing else."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import WanConfig
from ..errors import WanLiteError
from .card import StudentCard
from .keymap import wan_size
from .readers import readers
from .saving import CARD_FILE, PICTURE_FILE

# What Hugging Face has a word for (hf.co/docs/hub/repositories-licenses); any other licence is "other" there, with its name.
LICENCES = ("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
            "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "unlicense", "cc0-1.0")
HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"
LONGEST = 100                           # characters of a name that a user states
MEASURED = {
    "held_out_error": "held-out error of its velocity, relative to the teacher's",
    "held_out_drift": "held-out drift of its clips' brightness, contrast, sharpness and motion from the teacher's",
    "plain_cut_error": "the same error of the plain cut (the same size, sliced, untrained), or of what stands for it",
    "start_error": "error of its velocity before any training, relative to the teacher's",
    "best_step": "the training step that was kept",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stated:
    """What the user says of a student for its card. picture: a PNG. Raises WanLiteError on what is no name, such as a path.

    base_model: in words or as owner/name on Hugging Face. licence: the base model's. merged: whether a LoRA was merged while it was saved.
    """
    base_model: str = ""
    licence: str = ""
    picture: bytes = b""
    merged: bool = False

    def __post_init__(self) -> None:
        for what, value, form, fix in (
                ("base_model", self.base_model, rf"({HUB_NAME}|[\w .,:+()-]+)?", "Write a name such as Wan 2.1 T2V 1.3B or Wan-AI/Wan2.1-T2V-1.3B."),
                ("licence", self.licence, r"[\w .,:+()-]*", "Write a name such as Apache-2.0.")):
            if len(value) > LONGEST or not re.fullmatch(form, value) or value != value.strip():
                raise WanLiteError(f"{what} is {value[:LONGEST]!r}, which is no name.", "The model card travels with the student, and a path would too.", fix)


def card_files(name: str, stated: Stated, *, config: WanConfig, card: StudentCard | None, layout: str, dtype: torch.dtype | None) -> dict[str, bytes | None]:
    """{file name: its content} of README.md and the picture, which is None without one, of a student called `name`."""
    text = model_card(name, stated, config=config, card=card, layout=layout, dtype=dtype)
    return {CARD_FILE: text.encode("utf-8"), PICTURE_FILE: stated.picture or None}


def write_card(folder: Path, stated: Stated | None, *, config: WanConfig, card: StudentCard | None, layout: str, dtype: torch.dtype | None) -> None:
    """README.md and the picture, where the user's statements are asked for."""
    if stated is None:
        return
    for name, content in card_files(folder.name, stated, config=config, card=card, layout=layout, dtype=dtype).items():
        if content:
            (folder / name).write_bytes(content)


def model_card(name: str, stated: Stated, *, config: WanConfig, card: StudentCard | None, layout: str, dtype: torch.dtype | None) -> str:
    """The text of README.md for a student called `name`, saved in a folder of this layout."""
    kind = {"t2v": "text-to-video", "ti2v": "text-to-video"}.get(config.model_type, "image-to-video")
    stored = f", {str(dtype).removeprefix('torch.')}" if dtype else ""
    base = stated.base_model or "a WAN that is not stated"
    lines = [
        *_front(stated, kind, layout), f"# {name}", "",
        *([f"![{name}]({PICTURE_FILE})", ""] if stated.picture else []),
        f"A WAN for {kind}, {config.num_layers} blocks of {config.dim}, FFN {config.ffn_dim}: {wan_size(config) / 1e6:,.1f} M parameters{stored}. "
        f"It was made with WanLite from {base}.", "",
        f"Licence of the base model, as stated by who saved this: {stated.licence or 'not stated'}.", "",
        "## What was changed", "", *(f"- {change}" for change in _changes(stated, card, config)), "",
        *(_sampling(card) if card else []),
        *(_measured(card) if card and card.measured else []),
        "## How to open it", "", "| reader | how |", "|---|---|",
        *(f"| {reader.name} | {'not: ' + reader.why_not if reader.why_not else reader.how} |" for reader in readers(config, layout, "bf16")), "",
        *(_pipeline(config, card) if layout == "diffusers folder" else []),
    ]
    return "\n".join(lines)


def _front(stated: Stated, kind: str, layout: str) -> list[str]:
    """The YAML that Hugging Face reads. It takes a base model only as owner/name."""
    licence = stated.licence.lower()
    named = [f"license: {licence}"] if licence in LICENCES else ["license: other", f'license_name: "{stated.licence}"'] if licence else []
    base = [f"base_model: {stated.base_model}"] if re.fullmatch(HUB_NAME, stated.base_model) else []
    library = ["library_name: diffusers"] if layout == "diffusers folder" else []
    return ["---", *named, *base, *library, f"pipeline_tag: {kind}", "tags:", "- wan", "- wanlite", "- distillation", "- comfyui", "---", ""]


def _changes(stated: Stated, card: StudentCard | None, config: WanConfig) -> list[str]:
    merged = ["A LoRA was merged into the weights."] if stated.merged else []
    if card is None:
        return merged or ["Nothing that WanLite knows of."]
    told, recipe = [f"Teacher: {card.teacher}."] if card.teacher else [], card.recipe
    layers, ffn_dim = int(recipe.get("teacher_layers", 0)), int(recipe.get("teacher_ffn_dim", 0))
    if card.keep:
        whole = card.keep == tuple(range(layers))
        told.append(f"Blocks: all {layers} were kept." if whole else
                    f"Blocks: {len(card.keep)}{f' of {layers}' if layers else ''} were kept, those numbered {', '.join(map(str, card.keep))}.")
    if ffn_dim:
        told.append(f"FFN: all {ffn_dim} neurons of each block were kept." if ffn_dim == config.ffn_dim else
                    f"FFN: {config.ffn_dim} of {ffn_dim} neurons of each block were kept.")
    return [*told, *merged, _training(card)]


def _training(card: StudentCard) -> str:
    recipe = card.recipe
    if not recipe.get("train_steps"):
        return "Training: none."
    rank = int(recipe.get("rank", 0))
    what = f"a LoRA of rank {rank}" if rank else "all weights"
    return (f"Training: {int(recipe['train_steps']):,} steps of distillation from the teacher at cfg {recipe.get('cfg', 1.0):g}, of {what}"
            + (f", at a learning rate of {recipe['learning_rate']:g}." if "learning_rate" in recipe else "."))


def _sampling(card: StudentCard) -> list[str]:
    width, height, frames = card.size
    rows = {"sampler": card.sampler, "scheduler": card.scheduler, "steps": card.steps, "cfg": f"{card.cfg:g}", "shift": f"{card.shift:g}",
            "size": f"{width} x {height}, {frames} frames"}
    if card.expert:
        rows["noise levels"] = f"{'above' if card.expert == 'high' else 'below'} sigma {card.boundary:g} only: the other expert of 2.2 A14B has the rest"
    lines = ["## How to sample", "", "| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    return lines + (["The negative prompt has no effect: at cfg 1 it is not computed.", ""] if card.cfg == 1 else [])


def _measured(card: StudentCard) -> list[str]:
    rows = [f"| {MEASURED.get(name, name.replace('_', ' '))} | {value:.6g} |" for name, value in card.measured.items()]
    return ["## What was measured", "", "| what | value |", "|---|---|", *rows, ""]


def _pipeline(config: WanConfig, card: StudentCard | None) -> list[str]:
    """diffusers has a pipeline of its own for pictures, and calls the expert of low noise its second transformer."""
    kind = "WanImageToVideoPipeline" if config.in_dim != config.out_dim else "WanPipeline"
    place = "transformer_2" if card and card.expert == "low" else "transformer"
    return ["```python", f"from diffusers import {kind}, WanTransformer3DModel", "",
            'transformer = WanTransformer3DModel.from_pretrained("this folder")',
            f'pipeline = {kind}.from_pretrained("the base model, in diffusers\' layout", {place}=transformer)', "```", ""]
