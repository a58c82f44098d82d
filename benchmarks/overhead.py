"""What the trainer costs over a bare PyTorch loop: `python -m benchmarks.overhead` from the repository's root.

Both do the same forwards, backward, clipping, AdamW step and weight average at batch 16, in turn, on a random WAN of the demo's
shape; the trainer also draws its batch from the cache on disk, logs, and hands out events. Prints the medians and their ratio.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from wanlite_model.compress.build import create_student
from wanlite_model.distill import objectives
from wanlite_model.distill.data import TeacherCache, plan_units
from wanlite_model.distill.evaluate import student_velocity
from wanlite_model.distill.events import Step
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.optim import WeightAverage, make_optimizer
from wanlite_model.distill.trainer import run
from wanlite_model.prompts import PromptBank
from wanlite_model.teacher import ModuleTeacher
from wanlite_model.transformer import WanLiteStudent

from . import result_of

SHAPE = (16, 3, 8, 8)
WARM = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        trainer, bare = measure(Path(folder), steps)
    print(f"{'':10}{'median ms a step':>18}")
    print(f"{'trainer':10}{1000 * trainer:18.1f}\n{'bare loop':10}{1000 * bare:18.1f}\n{'ratio':10}{trainer / bare:18.3f}")


def measure(folder: Path, steps: int) -> tuple[float, float]:
    """Median seconds of a trainer's step and of a bare step, alternating in one process."""
    torch.manual_seed(0)
    teacher = ModuleTeacher(WanLiteStudent(hidden_size=128, depth=12, ffn_dim=512), shift=5.0)
    bank = PromptBank(prompts=tuple(f"prompt {i}" for i in range(12)), contexts=tuple(torch.randn(10, 4096) * 0.3 for _ in range(12)),
                      negative_text="", negative=torch.zeros(1, 4096))
    handle = result_of(create_student(teacher, bank, SHAPE, depth=8, method="interleaved", folder=folder / "starts"))[0]
    job = DistillJob(student=handle.fingerprint, teacher=teacher.fingerprint, prompts=bank.fingerprint, shape=SHAPE, shift=5.0,
                     steps=WARM + steps + 1, recipe=Recipe(batch_size=16, teacher_steps=4, evaluations=1))
    bare = bare_step(job, WanLiteStudent.from_pretrained(handle.folder, torch_dtype=torch.float32), bank, folder / "cache")
    times: tuple[list[float], list[float]] = ([], [])
    with closing(run(job, folder / "run", folder / "cache", teacher, handle, bank)) as events:
        _next_step(events)
        bare_of = bare()
        for _ in range(WARM + steps):
            for clock, work in zip(times, (lambda: _next_step(events), bare_of)):
                begun = time.perf_counter()
                work()
                clock.append(time.perf_counter() - begun)
    return statistics.median(times[0][WARM:]), statistics.median(times[1][WARM:])


def bare_step(job: DistillJob, student: WanLiteStudent, bank: PromptBank, cache_root: Path) -> Callable[[], Callable[[], None]]:
    """Prepares the loop that anyone would write; call the result once the cache is filled."""
    def prepared() -> Callable[[], None]:
        student.train()
        trained = dict(student.named_parameters())
        optimizer, average = make_optimizer(trained, job.recipe), WeightAverage(trained, job.recipe.ema_decay)
        batch = TeacherCache(cache_root, job, plan_units(job, bank, None)).batch(0)
        context, target = bank.cond(batch.prompts).context, batch.guided(job.cfg)
        scale = target.square().mean()

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            objectives.velocity_loss(student_velocity(student, batch.x, batch.sigma, context), target, scale).mean().backward()
            clip_grad_norm_(student.parameters(), job.recipe.max_grad_norm)
            optimizer.step()
            average.update(0)

        return step

    return prepared


def _next_step(events) -> None:
    while not isinstance(next(events), Step):
        pass


if __name__ == "__main__":
    main()
