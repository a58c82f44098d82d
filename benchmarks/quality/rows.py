"""The lines of the quality table: what is trained, from what, and how it is sampled."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from wanlite_model.compress.plan import Method
from wanlite_model.distill.job import Recipe
from wanlite_model.distill.presets import PRESETS

Kind = Literal["teacher", "baseline", "preset", "ablation"]
SLIM = 2 / 3                    # of the blocks
# What a tiny WAN needs in place of the presets' values for real ones, the same for every row and both worlds.
TINY = {"learning_rate": 2e-3, "batch_size": 16, "evaluations": 4}
TINY_LORA = {**TINY, "learning_rate": 4e-3}
TEACHER_STEPS, PATH_STEPS = 30, 6        # of the teacher as it is sampled, and of the paths that velocities are learned on
STEPS, BLOCK_STEPS = 800, 150


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line. steps, cfg: how it is sampled. share: of the teacher's blocks. recipe: None is not trained at all; training: optimizer steps.

    after: the row whose student this one starts from. of: the row whose student is the teacher of this one (at its steps, without cfg).
    block_steps: of each block's own training before. scratch: starts from random weights. frames: latent frames, None for the world's own.
    """
    name: str
    kind: Kind
    steps: int
    cfg: float | None = 1.0             # None: the world's
    share: float = 1.0
    method: Method = "greedy"
    block_steps: int = 0
    recipe: Recipe | None = None
    training: int = 0
    after: str = ""
    of: str = ""
    scratch: bool = False
    frames: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Rows that must have been trained before."""
        return tuple(name for name in (self.after, self.of) if name)


def preset(name: str, **changes: object) -> Recipe:
    """A preset's recipe at this size."""
    recipe = replace(PRESETS[name].recipe, **{key: value for key, value in changes.items() if key == "rank"})
    return replace(recipe, **{**(TINY_LORA if recipe.rank else TINY), **changes})


def rows(training: int = STEPS) -> tuple[Row, ...]:
    """Every row, in the order of the table."""
    def trained(name: str, base: str, *, kind: Kind = "preset", **settings: object) -> Row:
        changes = {key: settings.pop(key) for key in tuple(settings) if key in Recipe.__dataclass_fields__}
        recipe = preset(base, **changes)
        if recipe.objective != "trajectory":
            recipe = replace(recipe, teacher_steps=PATH_STEPS)        # one cache for all of them
        steps = recipe.student_steps if recipe.objective == "trajectory" else recipe.teacher_steps
        return Row(name=name, kind=kind, recipe=recipe, **{"training": training, "steps": steps, **settings})

    return (
        Row(name="teacher", kind="teacher", steps=TEACHER_STEPS, cfg=None),
        *(Row(name=f"teacher, {steps} steps{'' if cfg is None else ', no cfg'}", kind="baseline", steps=steps, cfg=cfg)
          for steps in (8, 4) for cfg in (None, 1.0)),
        Row(name="plain cut", kind="baseline", steps=PATH_STEPS, share=SLIM, method="interleaved"),
        trained("from scratch", "slim", kind="baseline", share=SLIM, scratch=True),
        trained("plain baseline", "slim", kind="baseline", share=SLIM, method="interleaved", objective="velocity"),
        trained("no-cfg", "no-cfg", steps=TEACHER_STEPS, training=training // 2),
        trained("slim", "slim", share=SLIM, block_steps=BLOCK_STEPS),
        trained("few-step 8", "few-step 8", training=training // 2),
        trained("few-step 4", "few-step 4", training=training // 2),
        trained("slim + few-step 4", "few-step 4", rank=0, after="slim", share=SLIM, training=training // 2, learning_rate=1e-3),
        Row(name="teacher, one frame", kind="baseline", steps=TEACHER_STEPS, cfg=None, frames=1),
        trained("image", "image", share=SLIM, block_steps=BLOCK_STEPS, frames=1),
        trained("slim of few-step 4", "slim", share=SLIM, block_steps=BLOCK_STEPS, of="few-step 4"),
    )


def ablations(training: int = STEPS) -> tuple[Row, ...]:
    """Each part of a preset left out, or put in, by itself."""
    return ()


def chosen(names: Iterable[str], everything: Iterable[Row]) -> tuple[Row, ...]:
    """These rows and what they need, in the order of the table. Raises KeyError on an unknown name."""
    table = {row.name: row for row in everything}
    wanted, todo = set(), list(names)
    while todo:
        row = table[todo.pop()]
        wanted.add(row.name)
        todo.extend(name for name in row.needs if name not in wanted)
    return tuple(row for row in table.values() if row.name in wanted)
