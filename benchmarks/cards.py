"""Which job fits which card: every preset on WAN's sizes, from the same prediction that a job makes before its first step.

    python -m benchmarks.cards                  the table of README's sizes
    python -m benchmarks.cards --templates      the jobs of example_workflows/, whose notes tell these numbers

Nothing is trained; it runs anywhere. Clips are of 832 x 480 and 17 frames (one for 'image'), 24 prompts and 1000 steps.
A student to be cut has two thirds of the blocks. A card has a GiB less than its name, for the desktop and for CUDA itself; the computer has 64 GB.
What `python -m benchmarks.memory --cap` measured on a card made to look that small stands beside it, in bold (benchmarks/memory.md).
"""
from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import zip_longest

import torch

from wanlite_model.compress.importance import tokens
from wanlite_model.compress.plan import interleaved
from wanlite_model.config import TEXT_DIM, WanConfig
from wanlite_model.distill.budget import GIB, USED, Machine, Peaks, forward_flops, predicted, run_bytes, step_seconds
from wanlite_model.distill.paths import state_counts
from wanlite_model.distill.job import DistillJob
from wanlite_model.distill.levers import Levers, LeverSettings, ladder
from wanlite_model.distill.presets import PRESETS
from wanlite_model.prompts import PromptBank

SIZES = {"1.3B": WanConfig(dim=1536, ffn_dim=8960, num_layers=30), "5B": WanConfig(dim=3072, ffn_dim=14336, num_layers=30, in_dim=48, out_dim=48),
         "14B": WanConfig(dim=5120, ffn_dim=13824, num_layers=40)}
CARDS = (8, 12, 16, 24, 80)
CUT = ("slim", "keep-cfg", "image")     # presets for a student with fewer blocks
FRAMES, HEIGHT, WIDTH = 5, 480, 832     # latent frames; pixels
PROMPTS, STEPS = 24, 1000
MEASURED = {("no-cfg", "1.3B", 8): "6.0 C", ("no-cfg", "1.3B", 12): "6.0 C", ("no-cfg", "1.3B", 24): "6.0 C", ("no-cfg", "14B", 24): "20.2 COF",
            ("slim", "1.3B", 8): "6.5 CO8", ("slim", "1.3B", 12): "6.5 CO8"}
RATE = 100e12                           # operations a second of a matrix product, that hours are told for
TEXT = torch.ones(64, TEXT_DIM)         # a prompt's tokens
BANK = PromptBank(prompts=("",), contexts=(TEXT,), negative_text="", negative=TEXT)
TEMPLATES = {       # preset, WAN, blocks that are kept, latents, and what the note says to change
    "A14B, each expert": ("no-cfg", "14B", 30, (FRAMES, HEIGHT // 8, WIDTH // 8), {}),
    "4 steps": ("few-step 4", "14B", 40, (FRAMES, HEIGHT // 8, WIDTH // 8), {}),
    "4 steps, batch_size 1": ("few-step 4", "14B", 40, (FRAMES, HEIGHT // 8, WIDTH // 8), {"batch_size": 1}),
    "image": ("image", "1.3B", 20, (1, 80, 80), {})}
LETTERS = {"checkpointing": "C", "checkpoints_on_cpu": "O", "frozen_float8": "F", "optimizer_8bit": "8", "gradient_release": "G"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", action="store_true", help="the jobs of example_workflows/")
    if parser.parse_args().templates:
        return of_templates()
    print(f"| preset | model | {' | '.join(f'{card} GB' for card in CARDS)} | disk, GB | hours at {RATE / 1e12:.0f} TFLOP/s |")
    print("|---|---|" + "---|" * (len(CARDS) + 2))
    for name, preset in PRESETS.items():
        for size, teacher in SIZES.items():
            student = teacher.resized(num_layers=len(interleaved(teacher.num_layers, teacher.num_layers * 2 // 3)), ffn_dim=teacher.ffn_dim) if name in CUT else teacher
            scale = 16 if teacher.out_dim == 48 else 8          # pixels a latent pixel
            shape = (teacher.out_dim, preset.frames or FRAMES, HEIGHT // scale, WIDTH // scale)
            job = DistillJob(student="", teacher="", prompts="", shape=shape, shift=5.0, steps=STEPS,
                             recipe=preset.recipe, fold_guidance=preset.fold_guidance)
            cells = [f"{cell}, **{MEASURED[name, size, card]}**" if (name, size, card) in MEASURED else cell
                     for cell, card in zip_longest(row(job, teacher, student), CARDS)]
            print(f"| {name} | {size} | {' | '.join(cells)} |", flush=True)


def of_templates() -> None:
    print(f"| template | {' | '.join(f'{card} GB' for card in CARDS)} | disk, GB | hours at {RATE / 1e12:.0f} TFLOP/s |")
    print("|---|" + "---|" * (len(CARDS) + 2))
    for name, (preset, size, blocks, shape, changes) in TEMPLATES.items():
        teacher, chosen = SIZES[size], PRESETS[preset]
        student = teacher.resized(num_layers=blocks, ffn_dim=teacher.ffn_dim)
        job = DistillJob(student="", teacher="", prompts="", shape=(teacher.out_dim, *shape), shift=5.0, steps=STEPS,
                         recipe=replace(chosen.recipe, **changes), fold_guidance=chosen.fold_guidance)
        print(f"| {name} | {' | '.join(row(job, teacher, student))} |", flush=True)


def row(job: DistillJob, teacher: WanConfig, student: WanConfig) -> list[str]:
    """The cells of a job: levers on each card, or - where it does not fit; disk; hours."""
    rungs = list(ladder(LeverSettings(), frozen=job.recipe.rank > 0, blocks=student.num_layers, device_type="cuda"))
    cells, found = [], None
    for card in CARDS:
        machine = Machine(device=(card - 1) * GIB, ram=64 * GIB, run_disk=0, cache_disk=0)
        fitting = next(((levers, peaks) for levers in rungs if (peaks := _peaks(job, student, levers)).fit(machine)), None)
        cells.append("-" if fitting is None else f"{fitting[1].device / GIB:.1f}{_letters(fitting[0])}")
        found = fitting or found
    if found is None:
        return [*cells, "-", "-"]
    levers, peaks = found
    return [*cells, f"{(cache_bytes(job) + run_bytes(peaks, student, job)) / 1e9:.0f}", f"{hours(job, teacher, student, levers):.1f}"]


def _peaks(job: DistillJob, student: WanConfig, levers: Levers) -> Peaks:
    return predicted(job, student, levers, "cuda", BANK)


def _letters(levers: Levers) -> str:
    pulled = "".join(letter for name, letter in LETTERS.items() if getattr(levers, name)) + (f"S{levers.swapped_blocks}" if levers.swapped_blocks else "")
    return f" {pulled}" if pulled else ""


def cache_bytes(job: DistillJob) -> int:
    """Of the teacher's answers to each prompt once."""
    path, renoised, _ = state_counts(job)
    columns = 1 if job.trajectory else 3
    return PROMPTS * (path + renoised + job.trajectory) * columns * 2 * math.prod(job.shape)


def hours(job: DistillJob, teacher: WanConfig, student: WanConfig, levers: Levers) -> float:
    """Of asking the teacher (guided: twice) and of the steps, by arithmetic."""
    asked = PROMPTS * sum(state_counts(job)) * 2 * forward_flops(teacher, tokens(job.shape))
    return (asked / (USED * RATE) + STEPS * step_seconds(job, student, levers, RATE, "cuda")) / 3600


if __name__ == "__main__":
    main()
