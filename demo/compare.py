"""Teacher, plain cut and student on the same prompts and noises: adherence, velocity error, and seconds through ComfyUI's own sampler."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanlite_model import flow
from wanlite_model.compress.apply import plain_cut
from wanlite_model.formats.write import MODEL_FILE, write_student
from wanlite_model.teacher import ModuleTeacher
from wanlite_model.transformer import WanLiteStudent

from . import domain, words
from .measure import PAIRS, sample, verdicts, wilson
from .timing import Sampled, timed
from .vae import Vae
from .workers import Workers
from .world import BALLS

ERROR_PAIRS, ERROR_STEPS = 32, 8        # teacher paths on which the velocity error is read
PICTURED = 4
TEACHER_ADHERENCE, KEPT_ADHERENCE, TIME_SHARE = 0.90, 0.95, 0.50        # what is promised: see `promises`


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model's line of the table. seconds: a video, warm, through ComfyUI's loader and sampler on the CPU; right: of `PAIRS` videos."""
    name: str
    blocks: int
    parameters: int
    steps: int
    cfg: float
    evaluations: int
    right: int
    velocity_error: float
    seconds: float

    @property
    def adherence(self) -> float:
        return self.right / PAIRS


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What the demo claims, with the numbers it was held against, and whether they bear it out."""
    text: str
    kept: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.kept else 'FAIL'}  {self.text}"


def promises(rows: Sequence[Row]) -> tuple[Promise, ...]:
    """What must hold of the table for the student to be worth having, and for the teacher to be worth distilling."""
    row = {row.name: row for row in rows}
    teacher, student = row["teacher"], row["student"]
    kept, time_share = student.right / max(1, teacher.right), student.seconds / teacher.seconds
    return (Promise(text=f"the teacher shows what was asked: adherence {teacher.adherence:.3f}, at least {TEACHER_ADHERENCE:.2f} promised",
                    kept=teacher.adherence >= TEACHER_ADHERENCE),
            Promise(text=f"the student keeps {kept:.1%} of the teacher's adherence, at least {KEPT_ADHERENCE:.0%} promised",
                    kept=kept >= KEPT_ADHERENCE),
            Promise(text=f"the student takes {time_share:.1%} of the teacher's seconds, less than {TIME_SHARE:.0%} promised",
                    kept=time_share < TIME_SHARE))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Result:
    """rows: teacher, plain cut, student. clips: {row name: frames [T, H, W, 3] of each pictured prompt}."""
    rows: tuple[Row, ...]
    clips: dict[str, list[np.ndarray]]
    prompts: tuple[str, ...]

    @property
    def summary(self) -> dict[str, dict[str, Any]]:
        """What summary.json holds."""
        return {row.name: {"blocks": row.blocks, "evaluations": row.evaluations, "adherence": row.adherence,
                           "adherence_interval": list(wilson(row.right, PAIRS)), "velocity_error": row.velocity_error,
                           "seconds": row.seconds, "steps": row.steps, "cfg": row.cfg, "parameters": row.parameters} for row in self.rows}

    def lines(self) -> list[list[str]]:
        """The table's cells, its header first."""
        head = ["", "blocks", "parameters", "steps", "cfg", "forwards", "adherence [95%]", "velocity error", "s / video (CPU)"]
        body = []
        for row in self.rows:
            low, high = wilson(row.right, PAIRS)
            body.append([row.name.replace("_", " "), f"{row.blocks}", f"{row.parameters / 1e6:.2f} M", f"{row.steps}", f"{row.cfg:g}",
                         f"{row.evaluations}", f"{row.adherence:.3f} [{low:.3f}, {high:.3f}]", f"{row.velocity_error:.4f}", f"{row.seconds:.2f}"])
        return [head, *body]

    def table(self) -> str:
        cells = self.lines()
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
                         for line in cells)


def measure(base: Path, student_name: str, cut_name: str) -> Result:
    """Measures what lies under base/models. The plain cut (same blocks in number, evenly taken, untrained) is written there first."""
    models = base / "models" / "diffusion_models"
    files = {"teacher": models / "wan_tiny_teacher.safetensors", "plain_cut": models / cut_name / MODEL_FILE,
             "student": models / student_name / MODEL_FILE}
    opened = {"teacher": open_fp32(files["teacher"]), "student": open_fp32(files["student"])}
    teacher = ModuleTeacher(opened["teacher"], shift=domain.SHIFT)
    write_student(models / cut_name, config=opened["student"].wan, tensors=plain_cut(teacher, opened["student"].wan),
                  dtype=torch.bfloat16, overwrite=True)
    opened["plain_cut"] = open_fp32(files["plain_cut"])
    steps, cfg = card_of(files["student"])
    settings = {"teacher": (30, domain.CFG), "plain_cut": (steps, cfg), "student": (steps, cfg)}
    vae = Vae(base / "models" / "vae" / "wan_tiny_vae.safetensors")
    with Workers() as workers:
        clips = {name: sampled(opened[name], vae, workers, *settings[name]) for name in settings}
        errors = velocity_errors(opened, settings, workers)
    seconds = timed({name: Sampled(file=files[name], world=BALLS, steps=steps, cfg=cfg) for name, (steps, cfg) in settings.items()})
    prompts = [prompt for prompt, _ in BALLS.pairs(PAIRS)]
    rows = tuple(Row(name=name, blocks=model.wan.num_layers, parameters=model.num_parameters(), steps=settings[name][0], cfg=settings[name][1],
                     evaluations=settings[name][0] * (1 if settings[name][1] == 1 else 2), velocity_error=errors[name], seconds=seconds[name],
                     right=sum(all(verdict.values()) for verdict in verdicts(clips[name], prompts)))
                 for name, model in ((name, opened[name]) for name in settings))
    return Result(rows=rows, prompts=tuple(prompts[:PICTURED]), clips={name: list(frames[:PICTURED]) for name, frames in clips.items()})


def open_fp32(file: Path) -> WanLiteStudent:
    return WanLiteStudent.from_pretrained(file, torch_dtype=torch.float32)


def card_of(file: Path) -> tuple[int, float]:
    """(steps, cfg) that the saved student recommends for itself."""
    from wanlite_model.formats.read import open_wan
    with open_wan(file) as source:
        return source.card.steps, source.card.cfg


def sampled(model: WanLiteStudent, vae: Vae, workers: Workers, steps: int, cfg: float) -> np.ndarray:
    """Clips [PAIRS, T, H, W, 3] of the fixed pairs. Our own sampler: it equals ComfyUI's (see demo.measure, `stock`) and takes a batch of prompts."""
    def part(some: Sequence[tuple[str, torch.Tensor]]) -> torch.Tensor:
        prompts, noise = zip(*some, strict=True)
        return vae.decode(sample(model, prompts, torch.stack(noise), steps, cfg))

    fixed = BALLS.pairs(PAIRS)
    return torch.cat(workers.map(part, [fixed[start:start + 16] for start in range(0, PAIRS, 16)])).numpy()


@torch.inference_mode()
def velocity_errors(models: dict[str, WanLiteStudent], settings: dict[str, tuple[int, float]], workers: Workers) -> dict[str, float]:
    """sum |v - v_w|^2 / sum |v_w|^2 on states of the guided teacher's paths from noises of its own, each model as it is sampled."""
    def part(some: Sequence[tuple[str, torch.Tensor]]) -> dict[str, tuple[float, float]]:
        prompts, noise = zip(*some, strict=True)
        context = words.context(list(prompts))[:, :16]
        negative = words.context([domain.NEGATIVE])[:, :1].expand(len(prompts), -1, -1)

        def velocity(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
            def at(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
                t, cfg = flow.TIMESTEPS * sigma, settings[name][1]
                v = models[name](x, t, context)
                return v if cfg == 1 else flow.guided(models[name](x, t, negative), v, cfg)
            return at

        sums = {name: [0.0, 0.0] for name in models}
        with torch.inference_mode():        # a mode holds for one thread
            for x, sigma, target in list(flow.euler_steps(velocity("teacher"), torch.stack(noise), flow.schedule(ERROR_STEPS, domain.SHIFT)))[:-1]:
                for name in models:
                    v = target if name == "teacher" else velocity(name)(x, sigma)
                    sums[name][0] += float((v - target).square().sum())
                    sums[name][1] += float(target.square().sum())
        return sums

    fixed = BALLS.pairs(PAIRS + ERROR_PAIRS)[PAIRS:]
    parts = workers.map(part, [fixed[start:start + 16] for start in range(0, ERROR_PAIRS, 16)])
    return {name: sum(p[name][0] for p in parts) / sum(p[name][1] for p in parts) for name in models}
