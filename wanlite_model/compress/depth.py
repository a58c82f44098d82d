"""Which blocks stay: greedy removal by what it does to the velocity, or all at once by how little a block changes what it is fed."""
from __future__ import annotations

import math
from collections.abc import Collection, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..teacher import Teacher
from .ffn import ROWS_AT_ONCE
from .importance import Probe, answers, velocity_errors, without
from .plan import Progress, check_depth, interleaved, protected

STAGE = "Choosing blocks"


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthChoice:
    """The kept blocks; their velocity error on the probe and that of the interleaved cut.

    removals: (block, its score) in order; the score is the velocity error after its removal, or its influence. forwards: how many times
    one state of the probe went through the teacher, whole or without some blocks, for all that the choice tells. The rollouts that
    made the probe are not among them.
    """
    keep: tuple[int, ...]
    error: float
    interleaved_error: float
    removals: tuple[tuple[int, float], ...]
    forwards: int


def greedy_depth(teacher: Teacher, probe: Probe, depth: int, *, spaced: bool = False) -> Generator[Progress, None, DepthChoice]:
    """Removes the block whose absence changes the velocity least, then scores again, until `depth` are left.

    A removal is taken to look no cheaper after another block has gone, so a block is scored again only when its last score is
    still below the best new one (lazy greedy, Minoux 1978): about four times fewer forwards. spaced: no neighbour of a removed block
    goes for as long as another may, so that gaps are one block wide wherever they can be. Should the interleaved cut come out better
    on the probe, it is what is returned. Yields once a forward.
    """
    layers = teacher.config.num_layers
    check_depth(depth, layers)
    turns = layers - depth
    scores = dict.fromkeys(_removable(layers, depth), 0.0)
    judge = _Judge(teacher, probe, total=len(scores) + turns + 1)
    removals: list[tuple[int, float]] = []
    yield from judge.ask()
    for turn in range(turns):
        best, lowest = -1, math.inf
        allowed = _apart(scores, [block for block, _ in removals]) if spaced else scores
        for block in sorted(allowed, key=lambda b: (scores[b], b)):
            if scores[block] >= lowest:
                break
            error = scores[block] = yield from judge.error({*(b for b, _ in removals), block})
            if error < lowest:
                best, lowest = block, error
            judge.done += turn == 0
        removals.append((best, lowest))
        del scores[best]
        judge.done, judge.note = judge.total - turns + turn, f"block {best} removed, velocity error {lowest:.1%}"
    return (yield from judge.verdict(removals, depth, removals[-1][1] if removals else 0.0))


def least_influence(teacher: Teacher, probe: Probe, depth: int) -> Generator[Progress, None, DepthChoice]:
    """Removes, all at once, the blocks that turn what they are fed the least; `depth` are left.

    A block's influence is 1 - the mean cosine between what it is fed and what it hands on, over all tokens and states (ShortGPT, Men et
    al. 2024, arXiv 2403.03853): one pass of the teacher tells it of every block, and no removal is tried before all are chosen. Should
    the interleaved cut come out better on the probe, it is what is returned. Yields once a forward.
    """
    layers = teacher.config.num_layers
    check_depth(depth, layers)
    judge = _Judge(teacher, probe, total=3)
    turned = {f"blocks.{block}": _Cosine() for block in _removable(layers, depth)}
    yield from judge.ask(turned)
    judge.done = 1
    influence = {block: 1 - turned[f"blocks.{block}"].mean for block in _removable(layers, depth)}
    removals = sorted(influence.items(), key=lambda pair: (pair[1], pair[0]))[:layers - depth]
    error = (yield from judge.error({block for block, _ in removals})) if removals else 0.0
    judge.done = 2
    return (yield from judge.verdict(removals, depth, error))


def _removable(layers: int, depth: int) -> list[int]:
    return sorted(set(range(layers)) - protected(layers, depth))


def _apart(blocks: Collection[int], removed: Collection[int]) -> Collection[int]:
    """Those that are next to no removed block; all of them when there are none."""
    return [block for block in blocks if not {block - 1, block + 1} & set(removed)] or blocks


class _Judge:
    """What the teacher answers on the probe, what it answers without some blocks, and a count of how often it was asked."""

    def __init__(self, teacher: Teacher, probe: Probe, total: int) -> None:
        self.teacher, self.probe, self.total = teacher, probe, total
        self.done, self.note, self.forwards = 0, "", 0

    def _told(self, states: int) -> Progress:
        self.forwards += states
        return Progress(stage=STAGE, done=self.done, total=self.total, note=self.note)

    def ask(self, taps: dict[str, _Cosine] = {}) -> Generator[Progress, None, None]:
        """Asks the whole teacher, once a state."""
        parts: list[Tensor] = []
        for v in answers(lambda x, sigma, cond: self.teacher.velocity(x, sigma, cond, taps=taps), self.probe):
            parts.append(v)
            yield self._told(len(v))
        self.target = torch.cat(parts)

    def error(self, skip: Collection[int]) -> Generator[Progress, None, float]:
        """The velocity error without these blocks, once a state."""
        error = 0.0
        for part in velocity_errors(without(self.teacher, frozenset(skip)), self.probe, self.target):
            error += part.sum().item() / len(self.probe)
            yield self._told(len(part))
        return error

    def verdict(self, removals: list[tuple[int, float]], depth: int, error: float) -> Generator[Progress, None, DepthChoice]:
        """These removals, whose velocity error is `error`, or the interleaved cut where that is better."""
        every = set(range(self.teacher.config.num_layers))
        keep, even = tuple(sorted(every - {block for block, _ in removals})), interleaved(len(every), depth)
        self.done = self.total
        even_error = yield from self.error(every - set(even))
        if even_error < error:
            keep, error = even, even_error
        return DepthChoice(keep=keep, error=error, interleaved_error=even_error, removals=tuple(removals), forwards=self.forwards)


class _Cosine:
    """A tap on a block that sums the cosine between what it is fed and what it hands on: no activation is kept."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def __call__(self, given: Tensor, answered: Tensor) -> None:
        """given, answered: [B, N, D]."""
        with torch.inference_mode(False), torch.no_grad():
            for before, after in zip(*(rows.detach().flatten(0, -2).split(ROWS_AT_ONCE) for rows in (given, answered))):
                self.sum += torch.cosine_similarity(before.float(), after.float(), dim=-1).double().sum().item()
                self.count += len(before)

    @property
    def mean(self) -> float:
        return min(1.0, self.sum / self.count)          # rounding can take it past 1
