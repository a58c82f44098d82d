"""The teacher's answers, asked for once and kept on disk: what a student is trained on.

A unit is one prompt with one noise: the states of one teacher rollout (Euler, guided), and the rollout's end (or the user's own
latents) noised again to other sigmas. For each state it holds what the teacher answered with and without the prompt, so that guidance
can be folded in or kept. For trajectory KD it is the points of a finer rollout alone: what lies between two of them is the answer. Units
are files of their own: an interrupted cache goes on where it stopped, and two jobs share what they have in common. What was changed or
damaged on disk since is noticed when it is read, and asked for again.
"""
from __future__ import annotations

import functools
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import chain, cycle, islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import flow
from ..compress.importance import TOKENS_AT_ONCE, tokens
from ..errors import WanLiteError
from ..files import replace_file
from ..prompts import PromptBank
from ..teacher import Teacher
from .job import MIN_UNITS, DistillJob
from .paths import STORED, Answers, own_points, own_sigmas, own_turns, rollout_sigmas, seeded, state_counts, taught_states, uniform_share, visit

VERSION = 4
REUSE = 2                       # times a state is trained on: more teaches it by heart, fewer asks the teacher too much
HELD_STATES = 96                # that the best weights are chosen by: half as many chose worse ones, by chance
STATES_OF_PROMPT = 256          # at most: they take disk as well as time
UNIT = "wanlite.unit"           # metadata of a unit: {"key": its own, "crc32": {tensor: [of each state]}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One prompt with one noise. `item`: which prompt (and which latent); `held`: never trained on."""
    index: int
    prompt: int
    item: int
    held: bool
    key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Training states: x [B, C, T, H, W] at sigma [B], the teacher's answers there, and the prompt of each.

    For trajectory KD v_pos is the guided average velocity from x to `goal` [B, C, T, H, W], the teacher's path at `following` [B].
    `rolled` [B]: from how many steps of the student's own the state is still to be made; x is then the noise it starts from, and what
    the teacher answers there is still to be found.
    """
    x: Tensor
    sigma: Tensor
    v_pos: Tensor
    prompts: tuple[int, ...]
    v_neg: Tensor | None = None
    goal: Tensor | None = None
    following: Tensor | None = None
    rolled: Tensor | None = None

    def guided(self, cfg: float) -> Tensor:
        """The teacher's guided velocity [B, C, T, H, W]."""
        return self.v_pos if self.v_neg is None else flow.guided(self.v_neg, self.v_pos, cfg)

    def __getitem__(self, part: slice) -> Batch:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: None if column is None else column[part] for name, column in columns.items()})


class Damaged(Exception):
    """A unit that is not what was written: it has to be asked for again."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.path = path


def check_latents(latents: Tensor | None, prompts: PromptBank) -> None:
    """Raises WanLiteError unless latent i [N, C, T, H, W] can belong to prompt i, or one prompt serves all."""
    if latents is not None and len(prompts) not in (1, len(latents)):
        raise WanLiteError(f"There are {len(latents)} latents and {len(prompts)} prompts.",
                           "Latent i belongs to prompt i, or one prompt serves all of them.",
                           "Give as many prompts as latents, in the same order, or a single prompt.")


def latents_fingerprint(latents: Tensor | None) -> str:
    """What `DistillJob.latents` holds: a hash of [N, C, T, H, W], empty without any."""
    return "" if latents is None else _digest(latents)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def plan_units(job: DistillJob, prompts: PromptBank, latents: Tensor | None, most: int | None = None, first: int | None = None) -> list[Unit]:
    """The units of a job, in order: every prompt once, then those that are trained on again, with other noises.

    The first of them are the same however many there are: of four, one is held out, until all are that are to be. `most` limits them to
    what a time budget allows (two at least). first: how many there were before the run was given more: those that were held out then are,
    and no others.
    """
    items = len(prompts) if latents is None else len(latents)
    count = _wanted(job, items)
    count = count if most is None else max(2, min(count, most))
    first = count if first is None else first
    held = prompts.held_out
    again = [item for item in range(items) if item not in held]
    once = [*chain.from_iterable((item, *again[3 * k:3 * k + 3]) for k, item in enumerate(held)), *again[3 * len(held):]]
    noises = range(first - max(1, first // 8), first)           # held out where no prompt is
    key_of = _keys(job, prompts, latents)
    return [Unit(index=index, prompt=_prompt_of(item, prompts), item=item, held=item in held if held else index in noises, key=key_of(index, item))
            for index, item in enumerate(islice(chain(once, cycle(again)), count)) if index < first or item not in held]


def _wanted(job: DistillJob, items: int) -> int:
    """How many units are worth having, were there time: each prompt once, and so many that no state has to be trained on over and over."""
    if job.matching:
        return max(MIN_UNITS, items)            # to measure on alone: what it learns from is its own
    most = items * max(1, STATES_OF_PROMPT // sum(state_counts(job)))
    if job.steps == 0:
        return max(MIN_UNITS, most)
    taught = sum(len(states) for index in range(MIN_UNITS) for states in taught_states(job, index)) / MIN_UNITS         # of one unit
    drawn = job.steps * job.recipe.batch_size
    return max(MIN_UNITS, min(items, drawn), min(most, math.ceil(drawn / (REUSE * taught))))


def _prompt_of(item: int, prompts: PromptBank) -> int:
    return item if len(prompts) > 1 else 0


def _keys(job: DistillJob, prompts: PromptBank, latents: Tensor | None) -> Callable[[int, int], str]:
    """(index, item) -> the name of that unit: a hash of everything that decides the answers in it."""
    negative = _digest(prompts.negative) if job.guided else None
    asked = "path" if job.trajectory else (uniform_share(job), state_counts(job))
    shared = (VERSION, _asked(job), job.shift, job.shape, job.cfg, rollout_sigmas(job).tolist(), asked, job.train_seed, negative)

    @functools.cache
    def of_item(item: int) -> tuple[str, str | None]:
        return prompts.key(_prompt_of(item, prompts)), None if latents is None else _digest(latents[item])

    return lambda index, item: hashlib.sha256(repr((*shared, index, *of_item(item))).encode()).hexdigest()[:24]


def _asked(job: DistillJob) -> object:
    """Whose answers they are: the same of both experts' jobs."""
    if job.role is None:
        return job.teacher
    return (job.teacher, job.other, job.role.boundary) if job.role.side == "high" else (job.other, job.teacher, job.role.boundary)


class TeacherCache:
    """The units of one job under `root`: filled once, then read in any order."""

    def __init__(self, root: Path, job: DistillJob, units: Sequence[Unit]) -> None:
        self.root, self.job, self.units = root, job, tuple(units)
        self.train = tuple(unit for unit in units if not unit.held)
        self.held = tuple(unit for unit in units if unit.held)

    def path(self, unit: Unit) -> Path:
        return self.root / f"{unit.key}.safetensors"

    def intact(self, unit: Unit) -> bool:
        """Whether the file is there, is this unit's, and is whole."""
        try:
            with safe_open(self.path(unit), "pt") as stored:
                whole = stored.get_slice("sigma").get_shape() == [sum(state_counts(self.job)) + self.job.trajectory]
                return whole and json.loads(stored.metadata()[UNIT])["key"] == unit.key
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return False

    def affordable(self, most: int) -> int:
        """How many of the units, from the first on, can be had when `most` of those that are not there yet may be asked for."""
        count = 0
        for unit in self.units:
            most -= not self.intact(unit)
            if most < 0:
                break
            count += 1
        return max(2, count)

    @property
    def missing_bytes(self) -> int:
        """That the units which are not there yet take on disk."""
        answers = 0 if self.job.trajectory else 2 if self.job.guided else 1             # beside the state itself
        each = (sum(state_counts(self.job)) + self.job.trajectory) * (1 + answers) * math.prod(self.job.shape) * STORED.itemsize
        return each * sum(not self.intact(unit) for unit in self.units)

    def groups(self) -> list[tuple[Unit, ...]]:
        """Units that go through the teacher together; the grouping is fixed, so a resumed cache is the same cache."""
        size = max(1, TOKENS_AT_ONCE // tokens(self.job.shape))
        return [self.units[i:i + size] for i in range(0, len(self.units), size)]

    @property
    def needed(self) -> TeacherCache:
        """What has to be asked for. Distribution matching learns from none of it and is measured on what is held out, which is little."""
        return TeacherCache(self.root, self.job, self.held) if self.job.matching else self

    def fill(self, teacher: Teacher, prompts: PromptBank, latents: Tensor | None, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, int]]:
        """Asks the teacher for what is missing. Yields (forwards done, forwards in all) after each. shard: (i, n): every n-th group from the i-th on."""
        groups, each = self.groups()[shard[0]::shard[1]], sum(state_counts(self.job))
        for number, group in enumerate(groups):
            missing = [unit for unit in group if not self.intact(unit)]
            if missing:
                which = [unit.prompt for unit in group]
                answers = Answers(self.job, teacher, prompts.cond(which), prompts.negative_cond(which) if self.job.guided else None)
                for done, _ in enumerate(visit(self.job, group, answers, latents), start=number * each + 1):
                    yield done, len(groups) * each
                for row, unit in enumerate(group):
                    if unit in missing:                 # another job may train on the others
                        self._write(unit, answers.of(row))
            else:
                yield (number + 1) * each, len(groups) * each

    def _write(self, unit: Unit, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise WanLiteError(f"The teacher's answer for prompt {unit.prompt + 1} is not finite ({name}).", "",
                                   "Check that the teacher samples a picture in a stock graph with the same cfg and shift.")
        told = {"key": unit.key, "crc32": {name: [_checksum(row) for row in tensor] for name, tensor in tensors.items()}}
        replace_file(self.path(unit), lambda path: save_file(tensors, path, metadata={UNIT: json.dumps(told)}))

    def _read(self, unit: Unit, *rows: int, names: Sequence[str] = ()) -> list[dict[str, Tensor]]:
        """Rows of some of the unit's tensors (of all without names), [1, ...] each, in float32. Raises Damaged when it is not as it was written."""
        try:
            with safe_open(self.path(unit), "pt") as stored:
                told = json.loads(stored.metadata()[UNIT])
                # Copies: a view would keep the file mapped, and Windows then refuses to replace it.
                found = [{name: stored.get_slice(name)[k:k + 1].clone() for name in names or stored.keys()} for k in rows]
            whole = told["key"] == unit.key and all(_checksum(value[0]) == told["crc32"][name][k] for k, row in zip(rows, found) for name, value in row.items())
        except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError):
            whole = False
        if not whole:
            raise Damaged(self.path(unit))
        return [{name: value.float() for name, value in row.items()} for row in found]

    def batch(self, step: int) -> Batch:
        """The training batch of one step: a function of (train_seed, step, place in the batch) alone."""
        units, states = [], []
        for place in range(self.job.recipe.batch_size):
            draw = seeded(self.job.train_seed, "draw", step, place)
            unit = self.train[int(torch.randint(len(self.train), (), generator=draw))]
            chances = torch.rand(2, generator=draw).tolist()
            units.append(unit)
            if self.job.trajectory:
                states.append(self._step_of(unit, *chances))
            else:
                own = float(torch.rand((), generator=draw)) < self.job.recipe.own_states and len(self._turns) > 1
                states.append(self._own(unit, draw) if own else {**self._state(unit, self._drawn(unit, *chances)), "rolled": torch.tensor([0])})
        return _collate(states, units)

    @functools.cached_property
    def _turns(self) -> range:
        return own_turns(self.job)

    def _own(self, unit: Unit, draw: torch.Generator) -> dict[str, Tensor]:
        """A state that the student is to come to in some of its own steps: from fresh noise, or from where the other expert left off."""
        steps = int(torch.randint(1, len(self._turns), (), generator=draw))
        noise = torch.randn(1, *self.job.shape, generator=draw) if self._turns.start == 0 else self._read(unit, self._turns.start)[0]["x"]
        unknown = {"v_pos": torch.zeros_like(noise), **({"v_neg": torch.zeros_like(noise)} if self.job.guided else {})}
        return {"x": noise, "sigma": own_sigmas(self.job)[steps:steps + 1], "rolled": torch.tensor([steps]), **unknown}

    def _drawn(self, unit: Unit, kind: float, where: float) -> int:
        path, renoised = taught_states(self.job, unit.index)
        from_path = len(path) > 0 and (len(renoised) == 0 or kind >= self.job.recipe.renoised)
        rows = path if from_path else renoised
        return rows[int(where * len(rows))]

    def _step_of(self, unit: Unit, kind: float, where: float) -> dict[str, Tensor]:
        """A step to learn: from one of the student's points, from any point of the path, or from where the student comes to by itself."""
        recipe, each = self.job.recipe, self.job.substeps
        first, count = self._turns.start, len(self._turns)
        if kind < recipe.full_range:
            points = own_points(self.job)
            return self._piece(unit, points[int(where * len(points))])
        turn = int(where * count)
        own = (kind - recipe.full_range) < recipe.own_states * (1 - recipe.full_range)
        return self._piece(unit, (first + turn) * each, turn if own else 0)

    def _piece(self, unit: Unit, k: int, rolled: int = 0) -> dict[str, Tensor]:
        """The step from point k of the path to the student's next point; `rolled` starts it where its own steps begin: see Batch."""
        first, start, end = self._read(unit, self._turns.start * self.job.substeps, k, (k // self.job.substeps + 1) * self.job.substeps)
        average = (end["x"] - start["x"]) / (end["sigma"] - start["sigma"])
        return {"x": first["x"] if rolled else start["x"], "sigma": start["sigma"], "v_pos": average, "goal": end["x"], "following": end["sigma"],
                "rolled": torch.tensor([rolled])}

    def held_out(self, most: int = HELD_STATES) -> Batch:
        """Held-out states, evenly spread over sigma: on the teacher's path and re-noised; for trajectory KD the student's points on it."""
        if self.job.trajectory:
            rows = [(unit, turn * self.job.substeps) for turn in self._turns for unit in self.held]
            rows = rows[::-(-len(rows) // most)]
            return _collate([self._piece(unit, k) for unit, k in rows], [unit for unit, _ in rows])
        by_index = {unit.index: unit for unit in self.held}
        rows = sorted((sigmas[k], unit.index, k) for unit in self.held for sigmas in [self._sigmas(unit)] for k in chain(*taught_states(self.job, unit.index)))
        count = min(most, len(rows))
        chosen = [rows[int((i + 0.5) * len(rows) / count)] for i in range(count)]
        units = [by_index[index] for _, index, _ in chosen]
        return _collate([self._state(unit, k) for unit, (_, _, k) in zip(units, chosen)], units)

    def held_out_paths(self) -> Batch:
        """The student's own part of each held-out unit's path as one step: of all of it, from its noise to its end."""
        states = []
        for unit in self.held:
            first, end = self._read(unit, *(turn * self.job.substeps for turn in (self._turns.start, self._turns.stop)))
            states.append({**first, "goal": end["x"], "following": end["sigma"], "v_pos": (end["x"] - first["x"]) / (end["sigma"] - first["sigma"]),
                           "rolled": torch.tensor([0])})
        return _collate(states, self.held)

    def sample(self, unit: Unit, latents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Where the student's own steps begin in a sample of the unit's prompt, and what the teacher made from there: [1, C, T, H, W] each.

        Of what one of two experts leaves to the other, the clip that it then sees. None where the data are the user's clips: the teacher has made none.
        """
        turns, each = self._turns, self.job.substeps
        if latents is None:
            return self._read(unit, turns.start * each)[0]["x"], self._arrived(unit, turns.stop * each)
        noise = torch.randn(1, *self.job.shape, generator=seeded(self.job.train_seed, "sample"))
        item = latents[unit.item:unit.item + 1].float()
        return (noise if turns.start == 0 else flow.add_noise(item, noise, own_sigmas(self.job)[:1])), None

    def _arrived(self, unit: Unit, k: int) -> Tensor:
        """The clip that the teacher's path comes to, as seen from its point k."""
        if not self.job.trajectory:
            row = self._read(unit, min(k, self.job.path_steps - 1))[0]
            guided = flow.guided(row["v_neg"], row["v_pos"], self.job.cfg) if "v_neg" in row else row["v_pos"]
            return flow.denoised(row["x"], guided, row["sigma"])
        here, *beyond = self._read(unit, *range(k, min(k + 1, self.job.path_steps) + 1))
        if not beyond:
            return here["x"]
        return flow.denoised(here["x"], (beyond[0]["x"] - here["x"]) / (beyond[0]["sigma"] - here["sigma"]), here["sigma"])

    def _sigmas(self, unit: Unit) -> list[float]:
        return [float(row["sigma"]) for row in self._read(unit, *range(sum(state_counts(self.job))), names=["sigma"])]

    def _state(self, unit: Unit, k: int) -> dict[str, Tensor]:
        return self._read(unit, k)[0]


class Ahead:
    """Batches by step, the next of which is read while this one is trained on. To be closed."""

    def __init__(self, batch_of: Callable[[int], Batch]) -> None:
        self._batch_of, self._reader, self._next = batch_of, ThreadPoolExecutor(1), (-1, Future())

    def __call__(self, step: int) -> Batch:
        """Raises what `batch_of` raises, Damaged for instance."""
        (expected, reading), self._next = self._next, (-1, Future())           # what was damaged is read anew
        batch = reading.result() if step == expected else self._batch_of(step)
        self._next = step + 1, self._reader.submit(self._batch_of, step + 1)
        return batch

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)


def _checksum(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().view(-1).view(torch.uint8).numpy())


def _collate(states: Sequence[dict[str, Tensor]], units: Sequence[Unit]) -> Batch:
    columns = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    return Batch(**columns, prompts=tuple(unit.prompt for unit in units))
