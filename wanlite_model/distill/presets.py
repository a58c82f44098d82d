"""The recipes that a user chooses by name: each is a row of `python -m benchmarks.quality`, and what the node starts from."""
from __future__ import annotations

from dataclasses import dataclass

from .job import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """told: what it makes, for a tooltip. fold_guidance: whether the student runs without cfg afterwards. frames: of the LATENT, where only
    one will do.
    """
    told: str
    recipe: Recipe
    fold_guidance: bool = True
    frames: int | None = None


PRESETS = {
    "no-cfg": Preset(told="cfg 1, so half the forwards (a LoRA)",
                     recipe=Recipe(rank=32, learning_rate=1e-4, renoised=0.7)),
    "slim": Preset(told="fewer blocks, cfg 1",
                   recipe=Recipe(optimizer="Muon", learning_rate=5e-5, renoised=0.7)),
    "few-step 8": Preset(told="8 steps, cfg 1 (a LoRA)", recipe=Recipe(objective="trajectory", rank=64, student_steps=8, teacher_steps=16, own_states=0.5)),
    "few-step 4": Preset(told="4 steps, cfg 1 (a LoRA)", recipe=Recipe(objective="trajectory", rank=64, student_steps=4, teacher_steps=12, own_states=0.5)),
    "image": Preset(told="one frame, 8 steps, cfg 1",
                    frames=1, recipe=Recipe(objective="trajectory", optimizer="Muon", learning_rate=5e-5, student_steps=8, teacher_steps=16, own_states=0.5)),
    "keep-cfg": Preset(told="fewer blocks, cfg and negative prompt as before", fold_guidance=False,
                       recipe=Recipe(optimizer="Muon", learning_rate=5e-5, renoised=0.7)),
}
