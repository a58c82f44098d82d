"""What the tests of compression share."""
import torch
from helpers_tiny import random_wan

from wanlite_model.teacher import ModuleTeacher

SHAPE = (16, 1, 8, 8)
IDENTITY = ("self_attn.o", "cross_attn.o", "ffn.2")         # with these at zero a block adds nothing


def result_of(steps):
    """Runs a generator of progress to its end and returns what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class CountingTeacher(ModuleTeacher):
    """A teacher that knows how often it was asked, and of how many states."""
    forwards = states = passes = 0

    def velocity(self, x, *args, **kwargs):
        self.forwards += 1
        self.states += len(x)
        return super().velocity(x, *args, **kwargs)

    def weights(self):
        self.passes += 1
        yield from super().weights()


def counting_teacher(seed=0, shift=3.0, idle=(), dtype=torch.float32, **fields):
    """A random teacher in which the blocks `idle` are the identity."""
    module = random_wan(seed, **fields)
    with torch.no_grad():
        for block in idle:
            for path in IDENTITY:
                for parameter in module.blocks[block].get_submodule(path).parameters():
                    parameter.zero_()
    return CountingTeacher(module.to(dtype), shift=shift)
