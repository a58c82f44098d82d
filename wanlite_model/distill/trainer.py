"""A distillation from start to end, as a generator of events.

Close it to stop (everything finished so far is kept, and the same job goes on from there); let it run to its end, or say so through
`should_finish`, to get the best student. No gradient or inference mode is held while the consumer has control.
"""
from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..compress.apply import plain_cut
from ..compress.handle import StudentHandle
from ..compress.importance import tokens
from ..errors import WanLiteError
from ..formats.lora import Lora
from ..prompts import PromptBank
from ..teacher import Cond, Teacher, fingerprint_tensors, guided_pair, pad_together
from . import objectives
from .begin import few_step_lora, fresh_state, online_teacher
from .checkpoint import RunFolder, TrainState
from .data import Batch, TeacherCache, check_latents, plan_units, seeded, student_sigmas
from .evaluate import Held, evaluate, roll, student_velocity
from .events import Eval, Event, Sample, Saved, Stage, Step
from .finish import PLAIN_CUT, Measured, finished_from_disk, unasked, write_finished
from .job import DistillJob
from .matching import Matching
from .optim import lr_at

log = logging.getLogger(__name__)

CACHE_SHARE = 0.4               # of a job's minutes may go into asking the teacher
TOKENS_A_PASS = 8192            # of a batch that go through the student at once; more are accumulated
TIMED_STEPS = 3
LEAST_STEPS = 10                # of a job that has minutes, however few they are


def lora_fingerprint(lora: Lora) -> str:
    """What `DistillJob.start_from` holds."""
    return fingerprint_tensors(lora.tensors())


def trains(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that make or change weights: ComfyUI runs nodes in inference mode, whose tensors can never be trained."""
    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)
    return outside


def run(job: DistillJob, folder: Path, cache_root: Path, teacher: Teacher, student: StudentHandle, prompts: PromptBank,
        latents: Tensor | None = None, should_finish: Callable[[], bool] = lambda: False, samples: bool = False,
        start_from: Lora | None = None) -> Iterator[Event]:
    """Distils `student` from `teacher` into the run folder; teacher answers are kept under `cache_root`.

    latents [N, C, T, H, W] in processed space are optional training data. samples: draw one at each evaluation. start_from: a LoRA over
    the student that training begins with: its factors where adapters are trained, else it is merged first. Ends with Finished.
    Raises WanLiteError when the job cannot start, when the folder is another job's, or when the loss is not finite.
    """
    return Run(job, RunFolder(folder), cache_root, teacher, student, prompts, latents, should_finish, samples, start_from).events()


@dataclass
class Run:
    """The parts of one run, and its story in `events`."""
    job: DistillJob
    files: RunFolder
    cache_root: Path
    teacher: Teacher
    handle: StudentHandle
    prompts: PromptBank
    latents: Tensor | None
    should_finish: Callable[[], bool]
    samples: bool
    start_from: Lora | None = None

    def events(self) -> Iterator[Event]:
        self._check()
        self.began, self.whole = time.monotonic(), True         # whole: the state is that after a step, not in one
        features = self.job.recipe.objective == "velocity + features"
        self.pairs = objectives.feature_pairs(self.handle.plan.keep, self.teacher.config.num_layers) if features else []
        with self.files.opened(self.job, {"teacher": self.teacher.name, "prompts": len(self.prompts)}):
            if (ended := finished_from_disk(self.files)) is not None:
                yield ended
                return
            try:
                yield from self._work()
            except torch.cuda.OutOfMemoryError as error:
                kept = "last step" if self.whole else "last checkpoint"
                raise WanLiteError("This job does not fit into this card's memory.", f"Everything up to the {kept} is kept.",
                                   "Type a new run name, and lower batch_size, the frames or the size of the LATENT, or keep fewer blocks.") from error

    def _work(self) -> Iterator[Event]:
        self.cache = yield from self._fill_cache()
        self.held = self.cache.held_out()
        self.paths = self.cache.held_out_paths() if self.job.trajectory else None
        yield Stage(name="loading the student", done=0, total=1)
        self.state = self._fresh_state()
        self.online = online_teacher(self.job, self.handle, self.teacher, self.state)
        self.matching = None if self.state.critic is None else Matching(
            job=self.job, state=self.state, critic=self.state.critic, teacher=self.online, prompts=self.prompts, cache=self.cache, at_once=TOKENS_A_PASS)
        self.plain, self.start = yield from self._baseline()
        resumed = self._restore()
        self.steps, self.every = yield from self._plan()
        if not resumed:
            self._keep_if_best(self.start.error)
        yield from self._train()
        yield from self._load(self.state.trained, self.files.load_best().items(), "loading the best")
        handed_out = yield from self._evaluate("evaluating what is handed out")
        yield Stage(name="writing the student", done=0, total=1)
        yield write_finished(self.job, self.files, self.handle, self.teacher, self.state, self.steps, self.cache, self.prompts,
                             Measured(best=handed_out, start=self.start, plain=self.plain, yardstick=self._yardstick()))

    def _check(self) -> None:
        check_latents(self.latents, self.prompts)
        given = {"student": self.handle.fingerprint, "teacher": self.teacher.fingerprint, "prompts": self.prompts.fingerprint,
                 "start_from": "" if self.start_from is None else lora_fingerprint(self.start_from)}
        for name, fingerprint in given.items():
            if getattr(self.job, name) != fingerprint:
                raise WanLiteError(f"The job was made for {name} {getattr(self.job, name)} and was given {fingerprint}.", "",
                                   "Build the job from the parts it is run with.")
        ours, its = self.handle.config, self.teacher.config
        if (ours.in_dim, ours.out_dim) != (its.in_dim, its.out_dim):
            raise WanLiteError(f"The student has {ours.in_dim} latent channels and the teacher {its.in_dim}.",
                               "They must speak of the same latents.", "Choose a student of the same WAN family.")
        if self._knows_it_all():
            raise WanLiteError("The student is its teacher, whole, and is asked for what that does already.", "",
                               "Type the cfg that you sample with and fold it in, take blocks away with WanLite Create Student, or choose a preset with fewer steps.")
        if self.job.recipe.objective == "velocity + features" and not self._is_cut():
            raise WanLiteError(f"The student is no part of this teacher: {ours.num_layers} blocks of {ours.dim} beside {its.num_layers} of {its.dim}.",
                               "Block features can only be compared between a teacher and what was cut from it.", "Choose another objective.")
        if self.job.matching:
            few_step_lora(self.job, self.handle, self.teacher, self.start_from)
        channels, _, height, width = self.job.shape
        if channels != self.teacher.config.out_dim:
            raise WanLiteError(f"The latents have {channels} channels; this teacher's have {self.teacher.config.out_dim}.", "",
                               "Make them with WAN's empty latent node, or encode pictures with WAN's VAE.")
        if height % 2 or width % 2:
            raise WanLiteError(f"The latents are {width} x {height}.", "WAN needs an even width and height in latents.",
                               "Choose a width and a height that are multiples of 16 pixels.")

    def _knows_it_all(self) -> bool:
        """Whether the student is its teacher and is asked for what that does itself: no guidance to fold in, no steps to save."""
        itself = self.handle.same_as == self.teacher.fingerprint and not self.handle.loras and not self.start_from
        return itself and not (self.job.guided and self.job.fold_guidance) and self.job.substeps == 1 and not self.job.matching

    def _is_cut(self) -> bool:
        """Whether the student can have been cut from this teacher; any other WAN of the same latents can learn from it too."""
        ours, its = self.handle.config, self.teacher.config
        return ours.dim == its.dim and max(self.handle.plan.keep) < its.num_layers and ours.ffn_dim <= its.ffn_dim

    def _fill_cache(self) -> Generator[Event, None, TeacherCache]:
        """How many units the minutes allow is measured on the first group, and noted before the others are asked for.

        Distribution matching learns from none of them and is measured on those held out: they are few, and all are asked for.
        """
        def cache(units: int | None) -> TeacherCache:
            return TeacherCache(self.cache_root, self.job, plan_units(self.job, self.prompts, self.latents, units))

        noted = self.files.noted("units")
        if self.job.steps == 0 and noted is None and not self.job.matching:
            whole = cache(None)
            affordable = len(whole.units)
            missing = next((group for group in whole.groups() if not all(map(whole.intact, group))), None)
            if missing is not None:
                begun = time.monotonic()
                yield from self._ask(TeacherCache(self.cache_root, self.job, missing))
                each = max(1e-3, (time.monotonic() - begun) / len(missing))
                affordable = max(0, int((CACHE_SHARE * 60 * self.job.minutes - self._seconds()) / each))
            noted = whole.affordable(affordable)
            self.files.note("units", noted)
        filled = cache(noted)
        if told := unasked(filled, self.prompts):
            log.warning("WanLite: %s", told)
        yield from self._ask(TeacherCache(self.cache_root, self.job, filled.held) if self.job.matching else filled)
        return filled

    def _ask(self, cache: TeacherCache) -> Iterator[Stage]:
        for done, total in cache.fill(self.teacher, self.prompts, self.latents):
            yield Stage(name="asking the teacher", done=done, total=total)

    @trains
    def _fresh_state(self) -> TrainState:
        return fresh_state(self.job, self.handle, self.teacher, self.start_from)

    @trains
    def _restore(self) -> bool:
        resumed = self.files.restore(self.state)
        self.files.restore_best(self.state)
        self.files.forget_after(self.state.step)
        return resumed

    def _baseline(self) -> Generator[Event, None, tuple[Held, Held]]:
        """The held-out error of the plain cut (the same size, sliced, untrained) and of the start; computed once a run.

        Where the start is the teacher itself they are one and the same, and a student that is no cut of its teacher has none: its start
        stands for it.
        """
        noted = self.files.noted("baseline")
        if noted is None:
            plain = start = yield from self._evaluate("evaluating the start")
            untouched = self.handle.same_as == self.teacher.fingerprint and not self.handle.loras
            if self._is_cut() and not self.start_from and not untouched and not self.job.matching:
                plain = yield from self._plain_cut()
            noted = {"plain_cut": asdict(plain), "start": asdict(start)}
            self.files.note("baseline", noted)
        return _held(noted["plain_cut"]), _held(noted["start"])

    def _yardstick(self) -> str:
        if self.start_from or self.job.matching:
            return "LoRA as it was"
        if not self._is_cut():
            return "untrained student"
        ours, its = self.handle.config, self.teacher.config
        whole = (ours.num_layers, ours.ffn_dim) == (its.num_layers, its.ffn_dim)         # then what is cut is nothing
        return "teacher without guidance" if whole else PLAIN_CUT

    def _plain_cut(self) -> Generator[Event, None, Held]:
        """What the plain cut is worth; the student gives it its place in memory, and comes back."""
        own = self.state.student.state_dict()
        yield from self._load(own, plain_cut(self.teacher, self.handle.config), "cutting the plain cut")
        held = yield from self._evaluate("evaluating the plain cut")
        with self.handle.open() as opened:
            yield from self._load(own, opened.tensors(), "loading the student")
        return held

    def _load(self, own: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], name: str) -> Iterator[Stage]:
        for done, (key, value) in enumerate(tensors, start=1):
            with torch.inference_mode(False), torch.no_grad():
                own[key].copy_(value)
            yield Stage(name=name, done=done, total=len(own))

    def _evaluate(self, name: str) -> Generator[Event, None, Held]:
        measuring = evaluate(self.state.student, self.held, self.prompts, self.job, self.paths)
        while True:
            try:
                done, total = next(measuring)
            except StopIteration as end:
                return end.value
            yield Stage(name=name, done=done, total=total)

    def _plan(self) -> Generator[Event, None, tuple[int, int]]:
        """Steps and the interval between evaluations: once, before step 0, from the speed measured here and now."""
        noted = self.files.noted("plan")
        if noted is None:
            steps = self.job.steps
            if steps == 0:
                seconds = []
                for i in range(TIMED_STEPS):
                    yield Stage(name="measuring the speed", done=i, total=TIMED_STEPS)
                    begun = time.monotonic()
                    self._trial(i)
                    seconds.append(time.monotonic() - begun)
                self.state.optimizer.state.clear()              # as before step 0
                begun = time.monotonic()
                yield from self._evaluate("measuring the speed")
                if self.samples:
                    yield from self._draw()
                evaluating = (time.monotonic() - begun) * self.job.recipe.evaluations
                left = 60 * self.job.minutes - self._seconds() - evaluating
                steps = max(LEAST_STEPS, int(0.95 * left / sorted(seconds)[len(seconds) // 2]))
            noted = {"steps": steps, "evaluate_every": -(-steps // self.job.recipe.evaluations)}
            self.files.note("plan", noted)
        return noted["steps"], noted["evaluate_every"]

    def _train(self) -> Iterator[Event]:
        """The loop. Whatever ends it, the last complete step is on disk afterwards."""
        saved, saved_at, state = self.state.step, time.monotonic(), self.state
        try:
            if self._due() and not self._measured():
                yield from self._measure()              # it was stopped while it did
            while state.step < self.steps and not self._over():
                step = self._step()
                self.files.log(kind="step", step=step.step, loss=step.loss, grad_norm=step.grad_norm, lr=step.lr, seconds=step.seconds)
                yield step
                if self._due():
                    yield from self._measure()
                if time.monotonic() - saved_at >= 60 * self.job.recipe.save_every:
                    size = self.files.save(state)
                    saved, saved_at = state.step, time.monotonic()
                    yield Saved(step=state.step, bytes=size)
            if state.step > 0 and not self._measured():
                yield from self._measure()              # it ended between two evaluations
        finally:
            if state.step > saved and self.whole:
                self.files.save(state)

    def _due(self) -> bool:
        """Whether the step that was just finished is one to evaluate."""
        return self.state.step > 0 and (self.state.step % self.every == 0 or self.state.step == self.steps)

    def _measured(self) -> bool:
        """Whether the weights after the last step were evaluated."""
        return any(row["step"] == self.state.step for row in self.files.rows("eval"))

    def _over(self) -> bool:
        """The user said so, or a job that was given minutes and not steps has used them up."""
        late = self.job.steps == 0 and self.state.step >= LEAST_STEPS and self._seconds() > 60 * self.job.minutes
        return late or self.should_finish()

    def _seconds(self) -> float:
        """Seconds that this session of the run has taken."""
        return time.monotonic() - self.began

    @trains
    def _step(self) -> Step:
        """One optimizer step. Everything random in it is a function of (train_seed, step)."""
        begun, state = time.monotonic(), self.state
        lr = lr_at(state.step, self.steps, self.job.recipe)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        for loss in self._backward(state.step, self.steps):
            norm = clip_grad_norm_(state.trained.values(), self.job.recipe.max_grad_norm)
            if not torch.isfinite(loss + norm):
                raise WanLiteError(f"The loss is not finite at step {state.step + 1}.", "What is on disk is from before it.",
                                   "Lower the learning rate and type a new run name.")
            self.whole = False
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
        state.average.update(state.step)
        state.step, self.whole = state.step + 1, True
        return Step(step=state.step, total=self.steps, loss=float(loss), grad_norm=float(norm), lr=lr, seconds=time.monotonic() - begun)

    @trains
    def _trial(self, step: int) -> None:
        """A step's work without moving a weight, to measure its speed."""
        for group in self.state.optimizer.param_groups:
            group["lr"] = 0.0
        for loss in self._backward(step, TIMED_STEPS):
            clip_grad_norm_(self.state.trained.values(), self.job.recipe.max_grad_norm)
            self.state.optimizer.step()
            self.state.optimizer.zero_grad(set_to_none=True)
            float(loss)             # a GPU's clock is read once all is done

    def _backward(self, step: int, total: int) -> Iterator[Tensor]:
        """Gradients, once or (with a critic) several times: yields the loss of each, and the caller moves the weights."""
        if self.matching is not None:
            yield from self.matching.backward(step)
        else:
            yield self._learn(step, total)

    def _learn(self, step: int, total: int) -> Tensor:
        """Gradients of one batch, in parts that fit; into which parts changes the velocity loss by rounding only. Returns the loss."""
        batch = self._rolled(self.cache.batch(step))
        contexts, targets = self._targets(batch, step)
        scale = targets.square().mean().to(self.teacher.device)
        size = max(1, TOKENS_A_PASS // tokens(self.job.shape))
        summed = torch.zeros((), device=self.teacher.device)
        for start in range(0, len(batch.x), size):
            part = slice(start, start + size)
            velocity, features = self._forward(batch[part], contexts[part])
            loss = objectives.velocity_loss(velocity, targets[part].to(velocity.device), scale).mean()
            if self.pairs:
                loss = loss + (1 - step / total) * objectives.feature_loss(features, self._teacher_features(batch[part], contexts[part]), self.pairs)
            loss = loss * (len(velocity) / len(batch.x))
            loss.backward()
            summed += loss.detach()
        return summed

    def _rolled(self, batch: Batch) -> Batch:
        """Takes those states that are to be the student's own as far as they are to be: their target leads back to the teacher's path."""
        if batch.rolled is None or not batch.rolled.any():
            return batch
        x, v, v_neg = batch.x.clone(), batch.v_pos.clone(), batch.v_neg
        rows = batch.rolled.nonzero().flatten()                                      # [R]
        for part in rows.split(max(1, TOKENS_A_PASS // tokens(self.job.shape) // 2)):      # a guided teacher takes two of each
            steps, which = batch.rolled[part], tuple(batch.prompts[row] for row in part.tolist())
            walk = roll(self.state.student, x[part], student_sigmas(self.job)[:int(steps.max()) + 1], self.prompts, which, self.job)
            for done, reached in enumerate(walk, start=1):
                x[part[steps == done]] = reached[steps == done]
            if self.job.trajectory:
                per_row = (slice(None), *[None] * (x.ndim - 1))
                v[part] = (batch.goal[part] - x[part]) / (batch.following - batch.sigma)[part][per_row]
            else:
                negative = self.prompts.negative_cond(len(part)) if self.job.guided else None
                v[part], found = guided_pair(self.online, x[part], batch.sigma[part], self.prompts.cond(which), negative)
                v_neg = v_neg if found is None else v_neg.index_copy(0, part, found)
        return replace(batch, x=x, v_pos=v, v_neg=v_neg)

    def _forward(self, part: Batch, context: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        return student_velocity(self.state.student, part.x, part.sigma, context, features=[mine for mine, _ in self.pairs])

    def _teacher_features(self, part: Batch, context: Tensor) -> dict[int, Tensor]:
        """{teacher block: what it hands on [B, N, D]}; the teacher is asked here and now, features are too large to keep on disk."""
        seen: dict[int, Tensor] = {}
        self.online.velocity(part.x, part.sigma, Cond(context=context), taps={
            f"blocks.{its}": lambda _, answered, its=its: seen.update({its: answered.detach().clone()}) for _, its in self.pairs})
        return seen

    def _targets(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """(contexts [B, L, 4096], velocities [B, C, T, H, W]) to learn.

        With guidance folded in, the prompts and the guided velocity. With guidance kept, each state is either the prompt's or, by a
        coin that is a function of (train_seed, step), the negative's: sampling with cfg needs both.
        """
        prompts = self.prompts.cond(batch.prompts).context
        if self.job.student_cfg == 1:
            return prompts, batch.guided(self.job.cfg)
        negative = torch.rand(len(batch.x), generator=seeded(self.job.train_seed, "coin", step)) < 0.5     # [B]
        both = pad_together(prompts, self.prompts.negative_cond(len(batch.x)).context).unflatten(0, (2, -1))   # [2, B, L, D]
        contexts = torch.where(negative.view(-1, 1, 1), both[1], both[0])
        return contexts, torch.where(negative.view(-1, 1, 1, 1, 1), batch.v_neg, batch.v_pos)

    def _measure(self) -> Iterator[Event]:
        """Evaluates the averaged weights, keeps them when they are the best so far, and draws a sample when asked to."""
        state = self.state
        with state.average.in_place():
            held = yield from self._evaluate("evaluating")
        best = self._keep_if_best(held.error)
        self.files.log(kind="eval", step=state.step, best=best, **asdict(held))
        yield Eval(step=state.step, held=held, plain_cut=self.plain, best=best)
        if self.samples:
            with state.average.in_place():
                latents = yield from self._draw()
            yield Sample(step=state.step, latents=latents)

    def _keep_if_best(self, error: float) -> bool:
        state = self.state
        if not error < state.best_error:
            return False
        state.best_error, state.best_step = error, state.step
        self.files.save_best(state)
        return True

    def _draw(self) -> Generator[Event, None, Tensor]:
        """A sample of the first held-out prompt as the student will be used: latents [1, C, T, H, W]."""
        which = (self.cache.held[0].prompt,)
        x = noise = torch.randn(1, *self.job.shape, generator=seeded(self.job.train_seed, "sample"))
        for done, x in enumerate(roll(self.state.student, noise, student_sigmas(self.job), self.prompts, which, self.job), start=1):
            yield Stage(name="drawing a sample", done=done, total=self.job.student_steps)
        return x


def _held(noted: dict[str, Any]) -> Held:
    return Held(**{**noted, "buckets": tuple(noted["buckets"])})
