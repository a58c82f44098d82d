"""Everything that decides what a distillation ends with: frozen values that are valid once built, and JSON."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ..errors import WanLiteError
from ..kinds import check_kinds
from ..roles import Role
from .levers import LeverSettings

Objective = Literal["velocity", "velocity + features", "trajectory", "distribution"]
OBJECTIVES: tuple[Objective, ...] = ("velocity", "velocity + features", "trajectory", "distribution")
OPTIMIZERS = ("AdamW", "Muon")
MIN_UNITS = 16                  # rollouts a job caches at least, however few prompts there are and however few steps
FEW_STEPS = 8                   # a teacher without cfg that takes no more is a few-step model


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Expert settings of a job. Raises WanLiteError outside the ranges that make sense.

    objective: "velocity": KD on the velocity. "velocity + features": and on the teacher's block outputs, which fade out over the job; the
        teacher stays in memory. "trajectory": the average velocity between two of `student_steps` points of the teacher's path, which
        one Euler step then takes. "distribution": goes on from the LoRA of a few-step student (see matching.py).
    rank: of LoRA factors over the frozen start; 0 trains all weights.
    student_steps: that the student is to be sampled with; velocity KD has the teacher's.
    own_states: share of the training states that the student has come to by itself. With trajectory KD it learns to go back to the
        teacher's path from there; with velocity KD the teacher, which then stays in memory, is asked there at every step.
    optimizer: "Muon" for the matrices of the blocks; adapters, and all else, have AdamW.
    learning_rate: the peak, after `warmup` steps; then a cosine to a tenth.
    batch_size: states a step.
    ema_decay: of the weights that are evaluated and kept.
    teacher_steps: Euler steps of a cached teacher rollout.
    renoised: share of the training states that are re-noised clean latents instead of states on the teacher's path.
    full_range: share of the training states whose sigma is uniform, not shifted (re-noised ones, so no more than those); with trajectory
        KD, of states between the student's own steps.
    evaluations: how often the held-out error is measured.
    save_every: minutes between checkpoints.
    """
    objective: Objective = "velocity"
    rank: int = 0
    student_steps: int = 4
    own_states: float = 0.0
    optimizer: Literal["AdamW", "Muon"] = "AdamW"
    learning_rate: float = 1e-4
    batch_size: int = 4
    warmup: int = 50
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    ema_decay: float = 0.99
    teacher_steps: int = 20
    renoised: float = 0.5
    full_range: float = 0.25
    evaluations: int = 8
    save_every: float = 10.0

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.objective not in OBJECTIVES:
            raise WanLiteError(f"objective is {self.objective!r}.", f"WanLite knows {' and '.join(map(repr, OBJECTIVES))}.")
        if self.optimizer not in OPTIMIZERS:
            raise WanLiteError(f"optimizer is {self.optimizer!r}.", f"WanLite knows {' and '.join(map(repr, OPTIMIZERS))}.")
        _check_ranges(self, {"rank": (0, 4096), "student_steps": (1, 100), "own_states": (0, 1), "learning_rate": (1e-7, 0.1), "batch_size": (1, 1024),
                             "warmup": (0, 10_000), "max_grad_norm": (1e-3, 1e3), "weight_decay": (0, 1), "ema_decay": (0, 0.99999),
                             "teacher_steps": (1, 1000), "renoised": (0, 1), "full_range": (0, 1), "evaluations": (1, 1000), "save_every": (0.1, 1e6)})


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillJob:
    """One distillation, whole.

    student, teacher, prompts, latents, start_from: fingerprints; latents is empty for a data-free job, start_from without a LoRA to begin with.
    shape: (C, T, H, W) of a training sample in latent units.
    shift: the deployment shift.
    cfg: the teacher's guidance scale; with `fold_guidance` it is folded into the student, which then runs at cfg 1.
    sigmas: the path of the teacher's rollouts from 1 to 0; None is the `simple` schedule.
    role, other: of a student that is one of two experts, its side of the boundary, and the fingerprint of the other expert; it is trained, and
        measured, on its own side alone, while the teacher's paths run through both.
    steps: of the optimizer; 0 lets `minutes` (of the whole job) decide. With minutes 0 a run is only prepared.
    """
    student: str
    teacher: str
    prompts: str
    latents: str = ""
    start_from: str = ""
    shape: tuple[int, int, int, int]
    shift: float
    cfg: float = 5.0
    fold_guidance: bool = True
    sigmas: tuple[float, ...] | None = None
    role: Role | None = None
    other: str = ""
    steps: int = 0
    minutes: float = 30.0
    train_seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    levers: LeverSettings = field(default_factory=LeverSettings)

    def __post_init__(self) -> None:
        check_kinds(self)
        _check_ranges(self, {"cfg": (1, 100), "steps": (0, 10_000_000), "minutes": (0, 1e6), "shift": (0.01, 1000)})
        if self.trajectory and self.latents:
            raise WanLiteError(f"The LATENT holds clips, and the objective is '{self.recipe.objective}'.", "A few-step student learns from the teacher's own clips.",
                               "Connect an empty LATENT of that size.")
        if self.trajectory and not self.fold_guidance:
            raise WanLiteError(f"The objective is '{self.recipe.objective}' and guidance is to be kept.", "A step of the teacher's guided path has guidance in it.",
                               "Choose a preset that folds guidance in.")
        if self.role is not None and self.role.side == "low" and self.latents and self.recipe.own_states > 0:
            raise WanLiteError("The student is the expert of low noise, the LATENT holds clips, and own_states is above 0.",
                               "It comes to states of its own from where the teacher's path crosses the boundary, and with clips there is no path.",
                               "Connect an empty LATENT, or set own_states to 0.")
        if self.role is not None and self.matching:
            raise WanLiteError("The objective is 'distribution' and the student is one of two experts.", "Distribution matching needs a student that makes whole clips.",
                               "Choose a few-step preset's own objective.")
        if self.matching and not self.recipe.rank:
            raise WanLiteError("The objective is 'distribution' and rank is 0.", "The student and its critic are adapters over one copy of the teacher.",
                               "Set a rank, 64 for instance.")
        if self.sigmas is not None:
            path = self.sigmas
            if len(path) < 2 or path[-1] != 0 or not 0.999 < path[0] <= 1 or not all(a > b for a, b in zip(path, path[1:])):
                raise WanLiteError(f"The sigmas run from {path[0] if path else 'nowhere'} to {path[-1] if path else 'nowhere'}.",
                                   "They must fall from 1, pure noise, to 0.", "Use BasicScheduler with denoise 1, or leave the input open.")
        asked = self.recipe.teacher_steps
        if self.trajectory and not self.guided and asked <= FEW_STEPS and asked % self.student_steps:
            raise WanLiteError(f"The teacher runs in {asked} steps without cfg, and the student is to have {self.student_steps}.",
                               "Such a teacher answers at its own noise levels alone, so each of the student's steps is one of its own or several whole ones.",
                               "Set student_steps in WanLite Recipe to " + " or ".join(str(n) for n in range(1, asked + 1) if asked % n == 0) + ".")

    @property
    def guided(self) -> bool:
        """Whether the teacher is asked for its negative prompt too."""
        return self.cfg != 1

    @property
    def trajectory(self) -> bool:
        """Whether the student learns steps of its own instead of the velocity at a point."""
        return self.recipe.objective in ("trajectory", "distribution")

    @property
    def matching(self) -> bool:
        """Whether what it learns is the distribution of the teacher's clips, not the clips themselves."""
        return self.recipe.objective == "distribution"

    @property
    def student_steps(self) -> int:
        """Steps that the student is meant to be sampled with."""
        if self.sigmas is not None:
            return len(self.sigmas) - 1
        if not self.trajectory:
            return self.recipe.teacher_steps
        few = not self.guided and self.recipe.teacher_steps <= FEW_STEPS         # such a teacher knows nothing of a finer path than its own
        return min(self.recipe.student_steps, self.recipe.teacher_steps) if few else self.recipe.student_steps

    @property
    def grid_only(self) -> bool:
        """Whether the teacher itself is a few-step model, which answers as it was meant to at its own sigmas alone."""
        return not self.guided and self.path_steps <= FEW_STEPS

    @property
    def substeps(self) -> int:
        """Steps that the teacher takes where the student takes one."""
        return max(1, round(self.recipe.teacher_steps / self.student_steps)) if self.trajectory else 1

    @property
    def path_steps(self) -> int:
        """Steps of the teacher's path."""
        return self.student_steps * self.substeps

    @property
    def student_cfg(self) -> float:
        """The guidance scale that the student is to be sampled with."""
        return 1.0 if self.fold_guidance else self.cfg

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DistillJob:
        """Raises WanLiteError when the value was not written by to_json of this version."""
        try:
            if set(value) != {f.name for f in fields(cls)}:
                raise TypeError("other fields")
            sigmas = value["sigmas"]
            role = None if value["role"] is None else Role(**value["role"])
            return cls(**{**value, "shape": tuple(value["shape"]), "sigmas": None if sigmas is None else tuple(sigmas), "role": role,
                          "recipe": Recipe(**value["recipe"]), "levers": LeverSettings(**value["levers"])})
        except TypeError as error:
            raise WanLiteError("The run's job.json was written by another version of WanLite.", "", "Type a new run name.") from error


def differences(old: DistillJob, new: DistillJob) -> list[str]:
    """'name=old, not new' for each value that decides the weights after a step, and differs."""
    before, after = _flat(old.to_json()), _flat(new.to_json())
    # How long it is and what it shows: a run is gone on with, ended earlier or given another leg (see legs.py).
    idle = {"steps", "minutes", "recipe.evaluations", "recipe.save_every", *(name for name in before if name.startswith("levers."))}
    if not old.trajectory and not new.trajectory:
        idle.add("recipe.student_steps")
    if old.recipe.rank and new.recipe.rank:
        idle.add("recipe.optimizer")
    if old.matching and new.matching:
        idle.add("recipe.own_states")
    if old.sigmas and new.sigmas:
        idle |= {"recipe.teacher_steps"} if not new.trajectory else {"recipe.student_steps"}
    return [f"{name}={before[name]}, not {after[name]}" for name in before if name not in idle and before[name] != after[name]]


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: {f"{name}.{inner}": item for inner, item in value[name].items()} for name in ("recipe", "levers")}
    role = value["role"] or {"side": "one of one", "boundary": None}
    return {**{name: item for name, item in value.items() if name not in parts}, "role": role["side"], "boundary": role["boundary"], **parts["recipe"], **parts["levers"]}


def _check_ranges(value: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in ranges.items():
        given = getattr(value, name)
        if not low <= given <= high:
            raise WanLiteError(f"{name} is {given}.", f"It must lie between {low} and {high}.")
