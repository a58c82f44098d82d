"""The teacher's paths: which noise levels they run through, and the rollouts that ask it there."""
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import flow
from ..cond import Cond
from ..errors import WanLiteError
from ..experts import Other
from ..roles import OVERLAP, SIDES
from ..teacher import Teacher, guided_pair
from .job import DistillJob

STORED = torch.float16          # rounding 2**-11 of a latent: far below what a student gets wrong
MOST_RENOISED = 0.75            # share up to which a unit holds more re-noised states for it; each takes a forward


class Rolled(Protocol):
    """What is known of a rollout: its number, and which of the user's clips it noises again."""
    index: int
    item: int


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator that is a function of its arguments alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def asked_of(job: DistillJob, teacher: Teacher, other: Teacher | None) -> Teacher:
    """Who makes the teacher's paths: itself, or both experts as one. Raises WanLiteError when the other one is not the job's."""
    given = "" if other is None else other.fingerprint
    if given != job.other or (job.role is None) != (other is None):
        raise WanLiteError(f"The job was made for the other expert {job.other or 'none'} and was given {given or 'none'}.", "",
                           "Build the job from the parts it is run with.")
    return teacher if other is None else Other(teacher=other, role=job.role).beside(teacher)


def rollout_sigmas(job: DistillJob) -> Tensor:
    """The sigmas of the teacher's path, from noise to 0."""
    return flow.subdivided(student_sigmas(job), job.substeps, job.shift)


def student_sigmas(job: DistillJob) -> Tensor:
    """The sigmas that the student is meant to be sampled along, from noise to 0."""
    return flow.schedule(job.student_steps, job.shift) if job.sigmas is None else torch.tensor(job.sigmas)


def own_turns(job: DistillJob) -> range:
    """Those of the student's steps that are its own to make: all, or an expert's on its side. Raises WanLiteError where there is none."""
    if job.role is None:
        return range(job.student_steps)
    turns = job.role.turns(student_sigmas(job))
    if not 0 < len(turns) < job.student_steps:
        raise WanLiteError(f"All {job.student_steps} steps lie on one side of the boundary {job.role.boundary:g} at shift {job.shift:g}.",
                           "Each of the two experts makes at least one.", "Set ModelSamplingSD3's shift to the one that you sample with, or more steps.")
    return turns


def own_points(job: DistillJob) -> range:
    """The points of the teacher's path that are the student's own to answer at: all, or those on an expert's side."""
    return range(job.path_steps) if job.role is None else job.role.turns(rollout_sigmas(job))


def own_sigmas(job: DistillJob) -> Tensor:
    """The sigmas that the student makes its own steps along."""
    turns = own_turns(job)
    return student_sigmas(job)[turns.start:turns.stop + 1]


def state_counts(job: DistillJob) -> tuple[int, int, int]:
    """How many states of a unit lie on the teacher's path, how many are re-noised, and how many both experts answered; in the file in this order.

    As many re-noised ones as the recipe's share of them asks for, so that all states are trained on equally often.
    """
    if job.trajectory:
        return job.path_steps, 0, 0
    shared = 0 if job.role is None or job.grid_only else 2
    if job.latents:
        return 0, job.path_steps, shared
    if job.grid_only:
        return job.path_steps, 0, 0         # it is asked what it was made to answer, and more often
    share = min(job.recipe.renoised, MOST_RENOISED)
    return job.path_steps, 0 if share == 0 else max(1, round(job.path_steps * share / (1 - share))), shared


def taught_states(job: DistillJob, index: int) -> tuple[Sequence[int], Sequence[int]]:
    """Which states of the unit of this index the student is taught: on the teacher's path, and re-noised. An expert's are those that its own
    teacher answered.
    """
    path, renoised, shared = state_counts(job)
    if job.role is None:
        return range(path), range(path, path + renoised)
    drawn = renoised_sigmas(job, renoised, seeded(job.train_seed, "renoise", index))
    own = [path + k for k in job.role.owns(drawn).nonzero().flatten().tolist()]
    both = [path + renoised + SIDES.index(job.role.side)] if shared else []
    return own_points(job) if path else (), own + both


class Answers:
    """Asks the teacher at one state of a whole group at a time and remembers; then hands out one unit's rows."""

    def __init__(self, job: DistillJob, teacher: Teacher, positive: Cond, negative: Cond | None) -> None:
        self.cfg, self.teacher, self.positive, self.negative = job.cfg, teacher, positive, negative
        kept = ("x", "sigma") if job.trajectory else ("x", "sigma", "v_pos", "v_neg") if negative else ("x", "sigma", "v_pos")
        self.columns: dict[str, list[Tensor]] = {name: [] for name in kept}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x [G, C, T, H, W], sigma [G] -> the guided velocity."""
        v_pos, v_neg = self.ask(self.teacher, x, sigma)
        return v_pos if v_neg is None else flow.guided(v_neg, v_pos, self.cfg)

    def ask(self, teacher: Teacher, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """(v_pos, v_neg) of this teacher, or of one of two experts whichever side it is on."""
        v_pos, v_neg = guided_pair(teacher, x, sigma, self.positive, self.negative)
        self.remember(x=x, sigma=sigma, v_pos=v_pos, v_neg=v_neg)
        return v_pos, v_neg

    def remember(self, **state: Tensor | None) -> None:
        """Adds a column of each kind that is kept."""
        for name, values in self.columns.items():
            if state.get(name) is not None:
                values.append(state[name])

    def of(self, row: int) -> dict[str, Tensor]:
        """{x, v_pos, v_neg [K, C, T, H, W], sigma [K]} of one unit."""
        stacked = {name: torch.stack([value[row] for value in values]) for name, values in self.columns.items()}
        return {name: value.float() if name == "sigma" else value.to(STORED) for name, value in stacked.items()}


def visit(job: DistillJob, group: Sequence[Rolled], answers: Answers, latents: Tensor | None) -> Iterator[None]:
    """Takes the group along the teacher's path, then to re-noised states; yields after each forward."""
    path, renoised, shared = state_counts(job)
    if latents is None:
        noise = torch.stack([torch.randn(job.shape, generator=seeded(job.train_seed, "rollout", u.index)) for u in group])
        walk = flow.euler_steps(answers, answers.positive.placed(noise), rollout_sigmas(job))
        for _ in range(path):
            next(walk)
            yield
        x0, end, _ = next(walk)                                                      # [G, C, T, H, W]
        if job.trajectory:
            answers.remember(x=x0, sigma=end)
    else:
        x0 = torch.stack([latents[u.item].float() for u in group])
    draws = [seeded(job.train_seed, "renoise", u.index) for u in group]
    sigmas = torch.stack([renoised_sigmas(job, renoised, draw) for draw in draws])                     # [G, R]
    if shared:                              # where one takes over from the other: what each of them says there
        pair, near = answers.teacher, [seeded(job.train_seed, "hand-over", u.index) for u in group]
        sigma = (job.role.boundary + (2 * torch.cat([torch.rand(1, generator=draw) for draw in near]) - 1) * OVERLAP).clamp(0, 1)         # [G]
        x = flow.add_noise(x0, torch.stack([torch.randn(job.shape, generator=draw) for draw in near]), sigma)
        # The low one, which the path ended with, is asked first, and the high one last, with which the next path begins. In the file it is the high one first.
        answers.ask(pair.ready(pair.low), x, sigma)
        low = {name: values.pop() for name, values in answers.columns.items()}
        yield
    for k in range(renoised):
        noise = torch.stack([torch.randn(job.shape, generator=draw) for draw in draws])
        answers(flow.add_noise(x0, noise, sigmas[:, k]), sigmas[:, k])
        yield
    if shared:
        answers.ask(pair.ready(pair.high), x, sigma)
        answers.remember(**low)
        yield


def renoised_sigmas(job: DistillJob, count: int, draw: torch.Generator) -> Tensor:
    if job.grid_only:
        grid = rollout_sigmas(job)[:-1]
        drawn = grid[torch.randperm(len(grid), generator=draw)[:count]]         # each once: an expert's side may be one of four
    else:
        drawn = flow.sample_sigma(count, job.shift, uniform_share(job), draw)
    # In this order the experts change places once: see visit.
    return drawn if job.role is None else drawn.sort().values


def uniform_share(job: DistillJob) -> float:
    """Of the re-noised states, so that the recipe's share of all states comes to a sigma that is drawn evenly."""
    return min(1.0, job.recipe.full_range / (1.0 if job.latents else max(job.recipe.renoised, 1e-6)))
