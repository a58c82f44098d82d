"""A tiny distillation that every test can afford, and how two of them are compared."""
import dataclasses
from contextlib import closing

import torch
from helpers_compress import result_of
from helpers_tiny import random_bank, random_teacher
from safetensors.torch import load_file

from wanlite_model.compress.build import create_student
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.finish import finished_from_disk
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.trainer import run
from wanlite_model.transformer import WanLiteStudent

SHAPE = (16, 2, 4, 4)
RECIPE = Recipe(learning_rate=2e-3, batch_size=4, warmup=2, teacher_steps=3, evaluations=2, ema_decay=0.5)


class Setting:
    """A tiny teacher, its student, prompts and folders."""

    def __init__(self, folder, prompts=3, depth=4):
        self.folder, self.teacher, self.bank = folder, random_teacher(), random_bank(prompts)
        self.student, _ = result_of(create_student(self.teacher, self.bank, SHAPE, depth=depth, ffn_dim=256, keep=None, method="interleaved",
                                                  seed=0, folder=folder / "starts"))

    def job(self, **changes):
        recipe = dataclasses.replace(RECIPE, **changes.pop("recipe", {}))
        return DistillJob(**{"student": self.student.fingerprint, "teacher": self.teacher.fingerprint, "prompts": self.bank.fingerprint,
                             "shape": SHAPE, "shift": self.teacher.shift, "cfg": 3.0, "steps": 6, "recipe": recipe, **changes})

    def events(self, job=None, name="run", **options):
        return run(job or self.job(), self.folder / name, self.folder / "cache", self.teacher, self.student, self.bank, **options)

    def state(self, name="run"):
        """Everything that training changes: weights, their average, the optimizer's moments."""
        return load_file(self.folder / name / "checkpoint.safetensors")

    def weights(self, name="run"):
        return WanLiteStudent.from_pretrained(finished_from_disk(RunFolder(self.folder / name)).handle.folder).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def until(events, wanted):
    with closing(events) as stream:
        for event in stream:
            if wanted(event):
                return event
    raise AssertionError("the event never came")
