"""The gradients of one step: what the student answers, what the teacher said there, and how far apart they are."""
from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compress.importance import tokens
from ..cond import Cond, chosen
from ..prompts import PromptBank
from ..teacher import Teacher, guided_pair
from ..transformer import WanLiteStudent
from . import objectives
from .data import Batch
from .evaluate import roll, student_velocity
from .job import DistillJob
from .paths import own_sigmas, seeded

TOKENS_A_PASS = 8192            # of a batch that go through the student at once; more are accumulated


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Learner:
    """KD on batches that `draw` gives by step. online: who is asked at a step; pairs: blocks whose outputs are matched, (student, teacher)."""
    job: DistillJob
    student: WanLiteStudent
    prompts: PromptBank
    online: Teacher
    device: torch.device
    draw: Callable[[int], Batch]
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def parts(self) -> int:
        """That a batch goes through in."""
        return -(-self.job.recipe.batch_size // self._size)

    @property
    def _size(self) -> int:
        return max(1, TOKENS_A_PASS // tokens(self.job.shape))

    def gradients(self, step: int, total: int) -> Iterator[Tensor | None]:
        """Those of one batch, in parts that fit; into which parts changes the velocity loss by rounding only.

        Yields None after each forward and backward pass, where a consumer may stop, and at the end the loss.
        """
        batch = yield from self.rolled(self.draw(step))
        conds, targets = self._targets(batch, step)
        scale = targets.square().mean().to(self.device)
        summed = torch.zeros((), device=self.device)
        for start in range(0, len(batch.x), self._size):
            part = slice(start, start + self._size)
            loss = self._loss(batch[part], conds[part], targets[part], scale, 1 - step / total) * (len(targets[part]) / len(batch.x))
            yield None
            loss.backward()
            summed += loss.detach()
            yield None
        yield summed

    def _loss(self, part: Batch, cond: Cond, target: Tensor, scale: Tensor, share: float) -> Tensor:
        """share: of the features in it."""
        velocity, features = student_velocity(self.student, part.x, part.sigma, cond, features=[mine for mine, _ in self.pairs])
        loss = objectives.velocity_loss(velocity, target.to(velocity.device), scale).mean()
        if self.pairs:
            loss = loss + share * objectives.feature_loss(features, self._teacher_features(part, cond), self.pairs)
        return loss

    def rolled(self, batch: Batch) -> Generator[None, None, Batch]:
        """Takes those states that are to be the student's own as far as they are to be: their target leads back to the teacher's path."""
        if batch.rolled is None or not batch.rolled.any():
            return batch
        x, v, v_neg = batch.x.clone(), batch.v_pos.clone(), batch.v_neg
        rows = batch.rolled.nonzero().flatten()                                      # [R]
        for part in rows.split(max(1, TOKENS_A_PASS // tokens(self.job.shape) // 2)):      # a guided teacher takes two of each
            steps, which = batch.rolled[part], tuple(batch.prompts[row] for row in part.tolist())
            walk = roll(self.student, x[part], own_sigmas(self.job)[:int(steps.max()) + 1], self.prompts, which, self.job)
            for done, reached in enumerate(walk, start=1):
                x[part[steps == done]] = reached[steps == done]
                yield None
            if self.job.trajectory:
                per_row = (slice(None), *[None] * (x.ndim - 1))
                v[part] = (batch.goal[part] - x[part]) / (batch.following - batch.sigma)[part][per_row]
            else:
                negative = self.prompts.negative_cond(which) if self.job.guided else None
                v[part], found = guided_pair(self.online, x[part], batch.sigma[part], self.prompts.cond(which), negative)
                v_neg = v_neg if found is None else v_neg.index_copy(0, part, found)
                yield None
        return replace(batch, x=x, v_pos=v, v_neg=v_neg)

    def _teacher_features(self, part: Batch, cond: Cond) -> dict[int, Tensor]:
        """{teacher block: what it hands on [B, N, D]}; the teacher is asked here and now, features are too large to keep on disk."""
        seen: dict[int, Tensor] = {}
        self.online.velocity(part.x, part.sigma, cond, taps={
            f"blocks.{its}": lambda _, answered, its=its: seen.update({its: answered.detach().clone()}) for _, its in self.pairs})
        return seen

    def _targets(self, batch: Batch, step: int) -> tuple[Cond, Tensor]:
        """The conditions and the velocities [B, C, T, H, W] to learn.

        With guidance folded in, the prompts and the guided velocity. With guidance kept, each state is either the prompt's or, by a
        coin that is a function of (train_seed, step), the negative's: sampling with cfg needs both.
        """
        prompts = self.prompts.cond(batch.prompts)
        if self.job.student_cfg == 1:
            return prompts, batch.guided(self.job.cfg)
        negative = torch.rand(len(batch.x), generator=seeded(self.job.train_seed, "coin", step)) < 0.5     # [B]
        conds = chosen(negative, self.prompts.negative_cond(batch.prompts), prompts)
        return conds, torch.where(negative.view(-1, 1, 1, 1, 1), batch.v_neg, batch.v_pos)
