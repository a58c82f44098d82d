"""The lines of the quality table: what is trained, from what, and how it is sampled."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from wanlite_model.compress.plan import Method
from wanlite_model.distill.job import Recipe
from wanlite_model.distill.presets import PRESETS

Kind = Literal["teacher", "baseline", "preset", "ablation"]
SLIM, NARROW = 2 / 3, 5 / 8     # of the blocks, of the FFN
# What a tiny WAN needs in place of the presets' values for real ones, the same for every row and every world.
TINY = {"learning_rate": 2e-3, "batch_size": 16, "evaluations": 4}
TINY_MUON = {**TINY, "learning_rate": 5e-3}
TINY_LORA = {**TINY, "learning_rate": 4e-3}
TINY_SHARPENED = {"learning_rate": 1e-3, "batch_size": 16, "evaluations": 5, "ema_decay": 0.98}
TEACHER_STEPS, PATH_STEPS, TRACED_STEPS = 30, 6, 20         # of the teacher as it is sampled, of the paths that velocities are learned on, and of those that nothing is added to
BLOCK_STEPS = 150
PLAIN = {"method": "interleaved", "optimizer": "AdamW"}
BASELINE_MORE = 1.5             # steps of a baseline, with AdamW, to one of slim's, with Muon: the same seconds at this size


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Optimizer steps: to heal a cut, to fold guidance into all of the blocks, to learn few steps."""
    heal: int
    fold: int
    few: int


QUICK, SHORT, LONG = Budget(heal=120, fold=60, few=60), Budget(heal=800, fold=400, few=400), Budget(heal=4000, fold=3200, few=400)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line. steps, cfg: how it is sampled; a student that is sampled with the world's cfg was trained to keep guidance. share, ffn: of the
    teacher's blocks and FFN. recipe: None is not trained at all; training: optimizer steps.

    method: of choosing blocks; "plain" is the plain cut. block_steps: of each block's own training before. refit: of what follows a gap.
    after: the row whose student this one starts from. of: the row whose student is the teacher of this one (without cfg).
    lora_of: the row of the first world whose LoRA lies over the start. scratch: starts from random weights. frames: latent frames, None
    for the world's own.
    """
    name: str
    kind: Kind
    steps: int
    cfg: float | None = 1.0             # None: the world's
    share: float = 1.0
    ffn: float = 1.0
    method: Method | Literal["plain"] = "spaced"
    refit: str = "none"
    block_steps: int = 0
    recipe: Recipe | None = None
    training: int = 0
    after: str = ""
    of: str = ""
    lora_of: str = ""
    scratch: bool = False
    frames: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Rows of the same world that must have been trained before."""
        return tuple(name for name in (self.after, self.of) if name)


def trained(name: str, base: str, training: int, *, kind: Kind = "preset", **settings: object) -> Row:
    """A row of a preset at this size. settings: of the row, and of its recipe."""
    changes = {key: settings.pop(key) for key in tuple(settings) if key in Recipe.__dataclass_fields__}
    recipe = replace(PRESETS[base].recipe, **changes)
    sized = TINY_LORA if recipe.rank else TINY_MUON if recipe.optimizer == "Muon" else TINY
    recipe = replace(recipe, **{**sized, **changes})
    if not recipe.objective.startswith("velocity"):
        return Row(name=name, kind=kind, recipe=recipe, **{"training": training, "steps": recipe.student_steps, **settings})
    recipe = replace(recipe, teacher_steps=changes.get("teacher_steps", PATH_STEPS))         # one cache for most of them
    return Row(name=name, kind=kind, recipe=recipe, **{"training": training, "steps": recipe.teacher_steps, **settings})


def slim(name: str, training: int, **settings: object) -> Row:
    return trained(name, "slim", training, **{"share": SLIM, **settings})


def rows(budget: Budget = SHORT) -> tuple[Row, ...]:
    """Teacher, baselines and presets, in the order of the table."""
    heal, fold, few = budget.heal, budget.fold, budget.few
    return (
        Row(name="teacher", kind="teacher", steps=TEACHER_STEPS, cfg=None),
        Row(name="teacher, no cfg", kind="baseline", steps=TEACHER_STEPS),
        *(Row(name=f"teacher, {steps} steps{'' if cfg is None else ', no cfg'}", kind="baseline", steps=steps, cfg=cfg)
          for steps in (8, PATH_STEPS, 4) for cfg in (None, 1.0)),
        Row(name="plain cut", kind="baseline", steps=PATH_STEPS, share=SLIM, method="plain"),
        slim("from scratch", heal, kind="baseline", scratch=True),
        slim("plain baseline", round(BASELINE_MORE * heal), kind="baseline", **PLAIN, renoised=0.0, full_range=0.0, teacher_steps=TRACED_STEPS, steps=PATH_STEPS),
        slim("plain baseline, slim's states", round(BASELINE_MORE * heal), kind="baseline", **PLAIN),
        trained("no-cfg", "no-cfg", fold, steps=TEACHER_STEPS),
        slim("slim", heal),
        trained("keep-cfg", "keep-cfg", heal, share=SLIM, cfg=None),
        trained("few-step 8", "few-step 8", few),
        trained("few-step 4", "few-step 4", few),
        trained("slim + few-step 4", "few-step 4", few, after="slim", share=SLIM),
        Row(name="teacher, one frame", kind="teacher", steps=TEACHER_STEPS, cfg=None, frames=1),
        Row(name="teacher, one frame, 8 steps", kind="baseline", steps=8, cfg=None, frames=1),
        Row(name="plain cut, one frame", kind="baseline", steps=8, share=SLIM, method="plain", frames=1),
        trained("image", "image", heal, share=SLIM, frames=1),
        slim("slim of few-step 4", heal // 2, of="few-step 4", teacher_steps=4),
    )


def ablations() -> tuple[Row, ...]:
    """Each part left out, or put in, by itself: untrained starts, and students that were trained for a short while."""
    heal, fold, few = SHORT.heal, SHORT.fold, SHORT.few
    start = {"kind": "ablation", "steps": PATH_STEPS}

    def cut(name: str, **settings: object) -> Row:
        return Row(name=name, **start, **{"share": SLIM, **settings})

    def healed(name: str, training: int = heal, **settings: object) -> Row:
        return slim(f"slim, short{name}", training, kind="ablation", **settings)

    def folded(name: str, **settings: object) -> Row:
        return trained(f"no-cfg, short{name}", "no-cfg", fold, kind="ablation", **settings)

    def stepped(name: str, steps: int = 4, **settings: object) -> Row:
        return trained(f"few-step {steps}{name}", "few-step 4", **{"training": few, "kind": "ablation", "student_steps": steps, **settings})

    return (
        cut("cut: spaced"), cut("cut: greedy", method="greedy"), cut("cut: influence", method="influence"),
        cut("cut: interleaved", method="interleaved"),
        cut("cut: spaced, mean folded", refit="mean"), cut("cut: spaced, least squares", refit="least squares"),
        cut("cut: spaced, block-wise", block_steps=BLOCK_STEPS),
        cut("narrow: first neurons", share=1.0, ffn=NARROW, method="plain"), cut("narrow: chosen and refitted", share=1.0, ffn=NARROW),
        healed(""), healed(", AdamW", round(BASELINE_MORE * heal), optimizer="AdamW"), healed(", block-wise", block_steps=BLOCK_STEPS),
        healed(", interleaved", method="interleaved"), healed(", greedy", method="greedy"), healed(", least squares", refit="least squares"),
        healed(", with features", objective="velocity + features"), healed(", own states", own_states=0.25),
        healed(", path alone", renoised=0.0), healed(", no full range", full_range=0.0), healed(", LoRA", rank=64),
        folded(""), folded(", rank 128", rank=128), folded(", all weights", rank=0, optimizer="Muon"),
        folded(", own states", own_states=0.25), folded(", path alone", renoised=0.0),
        stepped(", no own states", own_states=0.0), stepped(", all weights", rank=0, optimizer="Muon"), stepped(", the teacher's own 4 steps", teacher_steps=4),
        trained("slim + few-step 4, all weights", "few-step 4", few, kind="ablation", rank=0, optimizer="Muon", after="slim", share=SLIM),
        stepped("", steps=16, teacher_steps=16),
        stepped(" + distribution", objective="distribution", after="few-step 4", training=100, **TINY_SHARPENED),
    )


def moved(budget: Budget = SHORT) -> tuple[Row, ...]:
    """A speed LoRA over another teacher than the one that it was made for: as it is, and healed."""
    over = {"lora_of": "few-step 4", "kind": "preset"}
    return (
        Row(name="teacher", kind="teacher", steps=TEACHER_STEPS, cfg=None),
        Row(name="few-step 4 LoRA of another WAN", steps=4, **over),
        trained("the same, healed", "few-step 4", budget.few // 4, **over),
        trained("few-step 4, from nothing", "few-step 4", budget.few // 4),
    )


def chosen(names: Iterable[str], everything: Iterable[Row]) -> tuple[Row, ...]:
    """These rows and what they need, in the order of the table. Raises KeyError on an unknown name."""
    table = {row.name: row for row in everything}
    wanted, todo = set(), list(names)
    while todo:
        row = table[todo.pop()]
        wanted.add(row.name)
        todo.extend(name for name in row.needs if name not in wanted)
    return tuple(row for row in table.values() if row.name in wanted)
