"""Distribution matching without data (DMD2, Yin et al. 2024, arXiv 2405.14867): moves a few-step student's clips to where the teacher
finds them likely.

The student's own clip x0 is noised again to x_t. There the teacher, guided, and a critic that is trained on nothing but the student's clips
each say which clip they see, D = x_t - sigma v, and the student is moved along their difference:

    dL/dx0 = (D_critic - D_teacher) / mean|x0 - D_teacher|

Student, critic and teacher are one copy of the weights: the first two are adapters over it, the last is what is left without them.
"""
from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import flow
from ..compress.importance import tokens
from ..cond import Cond
from ..prompts import PromptBank
from ..teacher import Teacher, guided_velocity
from .adapters import Adapters
from .checkpoint import TrainState
from .data import TeacherCache
from .evaluate import roll, student_velocity
from .job import DistillJob
from .objectives import velocity_loss
from .paths import seeded, student_sigmas

CRITIC_UPDATES = 4              # to one of the student: it has to know the student's clips as they are now
LEAST_SIGMA, MOST_SIGMA = 0.02, 0.98        # beyond them x_t says too little, or all


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clips:
    """What a step is about: where the student came by, [x at each of its sigmas], each [B, C, T, H, W], the last its clip; and their prompts."""
    visited: tuple[Tensor, ...]
    prompts: tuple[int, ...]

    def __getitem__(self, part: slice) -> Clips:
        return Clips(visited=tuple(x[part] for x in self.visited), prompts=self.prompts[part])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Matching:
    """The gradients of a step. critic: adapters over the student's module, switched on only while they are asked. at_once: tokens of a pass."""
    job: DistillJob
    state: TrainState
    critic: Adapters
    teacher: Teacher
    prompts: PromptBank
    cache: TeacherCache
    at_once: int

    def gradients(self, step: int, total: int) -> Iterator[Tensor | None]:
        """Those of each of the critic's updates, then the student's: yields the loss of each, and the caller moves the weights; None on the way,
        where a consumer may stop as long as no weight has moved. `total` steps change nothing in it.

        All are about the same clips, drawn by (train_seed, step), noised anew for each.
        """
        draw = seeded(self.job.train_seed, "clips", step)
        clips, sigmas = (yield from self._clips(draw)), student_sigmas(self.job)
        for _ in range(CRITIC_UPDATES):
            with self.state.adapters.switched(False), self.critic.switched(True):
                loss = self._summed(clips, lambda part: self._critic_loss(part, draw))
            yield loss
        # Of the clip, which is the sum of the steps, each step is as much as it is long: the long ones are drawn as much more often.
        turn = int(torch.multinomial(sigmas.diff().abs(), 1, generator=draw))
        yield self._summed(clips, lambda part: self._student_loss(part, sigmas[turn], turn, draw))

    def _clips(self, draw: torch.Generator) -> Generator[None, None, Clips]:
        size, known = self.job.recipe.batch_size, self.cache.train
        which = tuple(known[i].prompt for i in torch.randint(len(known), (size,), generator=draw).tolist())
        noise, walks = torch.randn(size, *self.job.shape, generator=draw), []
        for part, of in zip(noise.split(self._size), (which[i:i + self._size] for i in range(0, size, self._size))):
            walks.append([])
            for x in roll(self.state.student, part, student_sigmas(self.job), self.prompts, of, self.job):
                walks[-1].append(x)
                yield None
        return Clips(visited=(noise, *map(torch.cat, zip(*walks))), prompts=which)

    @property
    def _size(self) -> int:
        """Clips that go through the student at once, and through the guided teacher twice each."""
        return max(1, self.at_once // tokens(self.job.shape) // 2)

    def _summed(self, clips: Clips, loss_of: Callable[[Clips], Tensor]) -> Tensor:
        """The mean loss over the clips, in parts that fit, with its gradients."""
        count, summed = len(clips.prompts), torch.zeros((), device=self.teacher.device)
        for start in range(0, count, self._size):
            part = clips[start:start + self._size]
            loss = loss_of(part) * (len(part.prompts) / count)
            loss.backward()
            summed += loss.detach()
        return summed

    def _noised(self, x0: Tensor, cond: Cond, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        sigma = flow.sample_sigma(len(x0), self.job.shift, self.job.recipe.full_range, draw).clamp(LEAST_SIGMA, MOST_SIGMA)
        noise = torch.randn(x0.shape, generator=draw)
        return cond.placed(flow.add_noise(x0, noise, sigma)), sigma, noise

    def _critic_loss(self, clips: Clips, draw: torch.Generator) -> Tensor:
        cond = self.prompts.cond(clips.prompts)
        x, sigma, noise = self._noised(clips.visited[-1], cond, draw)
        target = cond.answer(flow.velocity(clips.visited[-1], noise)).to(self.teacher.device)
        v = student_velocity(self.state.student, x, sigma, cond)
        return velocity_loss(v, target, target.square().mean()).mean()

    def _student_loss(self, clips: Clips, sigma: Tensor, turn: int, draw: torch.Generator) -> Tensor:
        """One of the student's steps takes the gradient, as far as the clip is the sum of its steps; what later steps make of it is left out."""
        cond = self.prompts.cond(clips.prompts)
        with torch.no_grad():
            gradient = self._gradient(clips, cond, draw).to(self.teacher.device)
        v = student_velocity(self.state.student, clips.visited[turn], sigma.expand(len(cond)), cond)
        moved = v.detach() - v                  # zero, but for its gradient: a step goes against the velocity
        return 0.5 * (moved + gradient).square().flatten(1).mean(1).mean()

    def _gradient(self, clips: Clips, cond: Cond, draw: torch.Generator) -> Tensor:
        """dL/dx0 [B, C, T, H, W]."""
        x0 = clips.visited[-1]
        x, sigma, _ = self._noised(x0, cond, draw)
        negative = self.prompts.negative_cond(clips.prompts) if self.job.guided else None
        real = flow.denoised(x, guided_velocity(self.teacher, x, sigma, cond, negative, self.job.cfg), sigma)
        with self.state.adapters.switched(False), self.critic.switched(True):
            fake = flow.denoised(x, student_velocity(self.state.student, x, sigma, cond).cpu(), sigma)
        scale = (x0 - real).abs().flatten(1).mean(1).clamp_min(1e-6)                 # [B]
        return (fake - real) / scale.view(-1, *[1] * (x0.ndim - 1))
