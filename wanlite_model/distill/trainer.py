"""A distillation from start to end, as a generator of events.

Close it to stop (everything finished so far is kept, and the same job goes on from there); let it run to its end, or say so through
`should_finish`, to get the best student. No gradient or inference mode is held while the consumer has control.
"""
from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..compress.apply import plain_cut
from ..compress.handle import StudentHandle
from ..errors import WanLiteError
from ..formats.lora import Lora
from ..pinned import give_back
from ..prompts import PromptBank
from ..teacher import Teacher
from . import inputs
from .asking import Asking
from .begin import beside, few_step_lora, fresh_state, online_teacher
from .budget import GIB, SPARE, USED, Budget, Machine, asking_flops, capped, check_disk, matrix_rate, plan, spilled, step_seconds, this_machine
from .checks import check, untouched
from .checkpoint import RunFolder, TrainState, size_of
from .data import Ahead, Damaged, TeacherCache
from .evaluate import Held, draw, evaluate
from .events import DRAWING, EVALUATING, Eval, Event, Planned, Sample, Saved, Stage, Step, staged
from .finish import PLAIN_CUT, UNGUIDED, Measured, finished_from_disk, unasked, write_finished, yardstick_of
from .frozen import places
from .inputs import Inputs
from .job import DistillJob
from .learner import TOKENS_A_PASS, Learner
from .legs import LEAST_STEPS, Course, Length, Speed
from .levers import Levers
from .matching import Matching
from .modes import trains
from .objectives import feature_pairs
from .paths import asked_of
from .room import clear_runs, in_use

log = logging.getLogger(__name__)
Result = TypeVar("Result")

TIMED_STEPS = 3
FULL = 0.05                     # of a card's memory: with less of it free it may go on in the computer's


def run(job: DistillJob, folder: Path, cache_root: Path, teacher: Teacher, student: StudentHandle, prompts: PromptBank,
        latents: Tensor | None = None, should_finish: Callable[[], bool] = lambda: False, samples: bool = False,
        start_from: Lora | None = None, machine: Machine | None = None, other: Teacher | None = None) -> Iterator[Event]:
    """Distils `student` from `teacher` into the run folder; teacher answers are kept under `cache_root`.

    latents [N, C, T, H, W] in processed space are optional training data. samples: draw one at each evaluation. start_from: a LoRA over
    the student that training begins with: its factors where adapters are trained, else it is merged first. machine: what it may take; None is
    what is free here, or what the job's settings say. other: where the student is one of two experts, the one that it is not. Ends with
    Finished. Raises WanLiteError when the job cannot start, does not fit, or when the folder is another job's, and when the loss is not finite.
    """
    return Run(job, RunFolder(folder), cache_root, teacher, student, prompts, latents, should_finish, samples, start_from, machine, other).events()


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
    machine: Machine | None = None
    other: Teacher | None = None

    def __post_init__(self) -> None:
        self.prompts = self.prompts.fitted(self.teacher.config, self.job.shape)
        self.asking = Asking(job=self.job, root=self.cache_root, teacher=asked_of(self.job, self.teacher, self.other), prompts=self.prompts,
                             latents=self.latents)
        self.length = Length(job=self.job, files=self.files, most_units=self.asking.most_units)

    def events(self) -> Iterator[Event]:
        check(self.job, self.handle, self.teacher, self.prompts, self.latents, self.start_from)
        self.began, self.unbroken, self.state = time.monotonic(), True, None
        with self.files.opened(self.job):
            inputs.keep(self.files, Inputs(student=self.handle, prompts=self.prompts, latents=self.latents, start_from=self.start_from), self.teacher,
                        self.cache_root, self.other)
            if (ended := self._finished()) is not None:
                yield ended
                return
            try:
                with in_use(self.cache_root):
                    yield from self._work()
            except OSError as error:
                raise WanLiteError(f"Run {self.files.path.name!r} could not be written or read ({error}).", "What was saved before is intact.",
                                   "Free disk space, or see to the drive it is on, and queue the same again: it goes on from there.") from error

    def _work(self) -> Iterator[Event]:
        self.course = self.length.course()
        self.budget = self._budget()
        yield self._planned(self.budget.told(self.length.to_come(self.course)) + self._not_counted())
        self.cache = yield from self._fill_cache()
        self.held, self.paths = yield from self._read(lambda: (self.cache.held_out(), self.cache.held_out_paths() if self.job.trajectory else None))
        while not (yield from self._fits()):
            levers, device = self.budget.rungs[1], self.teacher.device.type
            self.budget = replace(self.budget, rungs=self.budget.rungs[1:], peaks=None,
                                  step_seconds=step_seconds(self.job, self.handle.config, levers, matrix_rate(device), device))
            told = f"The job did not fit into memory. It goes on from its last saved step, with: {self.budget.rungs[0].told()}."
            log.warning("WanLite: %s", told)
            yield self._planned(told)

    def _budget(self) -> Budget:
        """What is done to save memory, and what the run takes. Raises WanLiteError when it cannot fit."""
        device, noted = self.teacher.device, self.files.noted("levers")
        machine = self.machine or this_machine(device, self.files.path, self.cache_root, self.job.levers)
        lora = few_step_lora(self.job, self.handle, self.teacher, self.start_from) if self.job.matching else self.start_from
        budget = plan(self.job, self.handle.config, machine, device, self.prompts, lora, None if noted is None else Levers(**noted),
                      beside(self.job, self.handle, self.teacher, lora), self.handle.dtype)
        kept = sum(file.stat().st_size for file in (self.files.checkpoint, self.files.best) if file.exists())
        limit = int(self.job.levers.runs_gib * GIB)
        used = [self.files.path, Path(self.handle.folder), *map(Path, self.handle.loras)]
        freed = clear_runs(self.files.path.parent, limit, used, budget.run - kept) if limit else 0
        check_disk(budget.run - kept, machine.run_disk + freed, self.files.path, "This run")
        if not self.length.to_come(self.course):
            return budget
        missing = self._planned_cache().needed
        return replace(budget, cache=missing.missing_bytes, asking_seconds=asking_flops(missing, self.teacher.config) / (USED * matrix_rate(device.type)))

    def _planned(self, told: str) -> Planned:
        length, course = self.length, self.course
        return Planned(budget=self.budget, told=told, steps=length.to_come(course), evaluations=length.evaluations_to_come(course))

    def _not_counted(self) -> str:
        """A sentence where the time leaves something out, else nothing."""
        recipe = self.job.recipe
        asks = self.job.matching or recipe.objective == "velocity + features" or recipe.own_states > 0
        return " What is asked of the teacher and of the student itself at the steps is not in this time." if asks else ""

    def _fits(self) -> Generator[Event, None, bool]:
        """The job, to its end; False when the device ran out of memory. What was not saved then is lost, and nothing is left on the device."""
        levers = self.budget.rungs[0]
        self.files.note("levers", asdict(levers))
        self.asking.teacher.release(self._room())
        try:
            with capped(self.teacher.device, self.budget.machine):
                yield from self._train_with(levers)
            return True
        except torch.cuda.OutOfMemoryError as error:
            if len(self.budget.rungs) == 1:
                raise WanLiteError("This job does not fit into this card's memory, whatever is done to save some.",
                                   f"Everything up to the {'last step' if self.whole else 'last checkpoint'} is kept.",
                                   "Type a new run name, and lower the frames or the size of the LATENT, or keep fewer blocks.") from error
        self.state = self.online = self.learner = None
        self.unbroken = True
        give_back(self.teacher.device)
        return False

    def _room(self) -> float:
        """Bytes of the device that the job takes; all of it on a CPU, which has no other place, and where a smaller card is planned for."""
        peaks = self.budget.peaks
        return math.inf if peaks is None or self.job.levers.gpu_gib or self.teacher.device.type == "cpu" else peaks.device / SPARE

    def _train_with(self, levers: Levers) -> Iterator[Event]:
        yield Stage(name="loading the student", done=0, total=1)
        self.state = self._fresh_state(levers)
        self.online = online_teacher(self.job, self.handle, self.teacher, self.state)
        with closing(Ahead(self.cache.batch)) as batches:
            self.learner = self._learner(batches)
            self.plain, self.start, self.yardstick = yield from self._baseline()
            resumed = self._restore()
            if self.course is None:
                self.course = yield from self._begin_course()
            self.last = self.length.last(self.course, self.state.step)
            if not resumed:
                self._keep_if_best(self.start.error)
            yield from self._train()
        yield from self._load(self.state.trained, self.files.best_weights(), "loading the best")
        handed_out = yield from self._evaluate("evaluating what is handed out")
        yield Stage(name="writing the student", done=0, total=1)
        yield write_finished(self.job, self.files, self.handle, self.teacher, self.state, self.course.total, self.length.wanted(self.course), self.cache,
                             self.prompts, Measured(best=handed_out, start=self.start, plain=self.plain, yardstick=self.yardstick))

    def _finished(self) -> Event | None:
        """What the run ended with before, unless it is asked for more than it was then."""
        ended, noted = finished_from_disk(self.files), self.files.noted("finished")
        if ended is None or self.length.wanted(self.length.noted()) > max(noted["asked"], noted["step"]):
            return None
        return ended

    def _begin_course(self) -> Generator[Event, None, Course]:
        """Steps and the interval between evaluations: once, before step 0, from the speed measured here and now."""
        speed = None
        if self.job.steps == 0:
            speed = yield from self._measured_speed()
        return self.length.begin(len(self.cache.units), speed)

    def _measured_speed(self) -> Generator[Event, None, Speed]:
        seconds = []
        while len(seconds) < TIMED_STEPS:
            begun = time.monotonic()
            try:
                yield from self._trial(len(seconds))
            except Damaged as damaged:
                yield from self._ask_again(damaged)
                continue
            seconds.append(time.monotonic() - begun)
        self.state.optimizer.state.clear()              # as before step 0
        self.unbroken = True
        begun = time.monotonic()
        yield from self._evaluate("measuring the speed")
        if self.samples:
            yield from self._draw()
        evaluating = (time.monotonic() - begun) * self.job.recipe.evaluations
        return Speed(seconds=max(1e-6, sorted(seconds)[len(seconds) // 2]), before=self._seconds() + evaluating)

    def _fill_cache(self) -> Generator[Event, None, TeacherCache]:
        """How many units the minutes allow is measured on the first group, and noted before the others are asked for."""
        if self.course is None and self.job.steps == 0 and self.files.noted("units") is None and not self.job.matching:
            affordable = yield from self.asking.affordable(self._seconds)
            self.files.note("units", affordable)
        filled = self._planned_cache()
        if told := unasked(filled, self.prompts):
            log.warning("WanLite: %s", told)
        self.asking.make_room(filled, self.budget.machine.cache_disk)
        yield from self.asking.fill(filled)
        return filled

    def _planned_cache(self) -> TeacherCache:
        """The units that the legs draw from, as far as that is known."""
        if self.course is None:
            return self.asking.cache(self.files.noted("units"))
        return self.asking.cache(self.course.legs[-1].units, self.course.legs[0].units)

    def _read(self, read: Callable[[], Result]) -> Generator[Event, None, Result]:
        """What `read` returns; units that turn out to be damaged are asked for again."""
        while True:
            try:
                return read()
            except Damaged as damaged:
                yield from self._ask_again(damaged)

    def _ask_again(self, damaged: Damaged) -> Iterator[Stage]:
        log.warning("WanLite: the teacher's answers in %s are damaged and are asked for again.", damaged.path.name)
        damaged.__traceback__ = None            # its frames may hold the file
        damaged.path.unlink(missing_ok=True)
        yield from self.asking.fill(self.cache)
        if self.state is None or self.online is not self.teacher:
            self.asking.teacher.release()
        elif self.other is not None:
            self.other.release()                # no step asks it

    @trains
    def _fresh_state(self, levers: Levers = Levers()) -> TrainState:
        return fresh_state(self.job, self.handle, self.teacher, self.start_from, levers)

    def _learner(self, batches: Ahead) -> Learner | Matching:
        if self.state.critic is not None:
            return Matching(job=self.job, state=self.state, critic=self.state.critic, teacher=self.online, prompts=self.prompts, cache=self.cache,
                            at_once=TOKENS_A_PASS)
        features = self.job.recipe.objective == "velocity + features"
        return Learner(job=self.job, student=self.state.student, prompts=self.prompts, online=self.online, device=self.teacher.device, draw=batches,
                       pairs=tuple(feature_pairs(self.handle.plan.keep, self.teacher.config.num_layers)) if features else ())

    @trains
    def _restore(self) -> bool:
        resumed = self.files.restore(self.state)
        self.files.restore_best(self.state)
        self.files.forget_after(self.state.step)
        return resumed

    def _baseline(self) -> Generator[Event, None, tuple[Held, Held, str]]:
        """The held-out error of what the student is compared with, that of the start, and what the former is; computed once a run."""
        noted = self.files.noted("baseline")
        if noted is None:
            plain = start = yield from self._evaluate("evaluating the start")
            yardstick = yardstick_of(self.job, self.handle, self.teacher, self.start_from)
            if yardstick in (PLAIN_CUT, UNGUIDED) and not untouched(self.handle, self.teacher):
                plain = yield from self._plain_cut()
            noted = {"plain_cut": asdict(plain), "start": asdict(start), "yardstick": yardstick}
            self.files.note("baseline", noted)
        return Held.from_json(noted["plain_cut"]), Held.from_json(noted["start"]), noted["yardstick"]

    def _plain_cut(self) -> Generator[Event, None, Held]:
        """What the plain cut is worth; the student gives it its place in memory, and comes back."""
        own = places(self.state.student)
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
        return (yield from staged(name, evaluate(self.state.student, self.held, self.prompts, self.job, self.paths)))

    def _train(self) -> Iterator[Event]:
        """The loop. Whatever ends it, the last complete step is on disk afterwards."""
        saved, saved_at, state, seconds = self.state.step, time.monotonic(), self.state, []
        try:
            if self.course.due(state.step) and not self._measured():
                yield from self._measure()              # it was stopped while it did
            while state.step < self.last and not self._over():
                step = yield from self._step()
                self.files.log(kind="step", step=step.step, loss=step.loss, grad_norm=step.grad_norm, lr=step.lr, seconds=step.seconds)
                yield step
                seconds.append(step.seconds)
                if self._may_spill() and spilled(seconds, self.budget.step_seconds):
                    raise torch.cuda.OutOfMemoryError("The steps take as long as they do when a card's memory goes on in the computer's.")
                if self.course.due(state.step):
                    yield from self._measure()
                if time.monotonic() - saved_at >= 60 * self.job.recipe.save_every:
                    yield Stage(name=f"saving {size_of(state) / 2**30:.1f} GiB", done=0, total=1)
                    size = self.files.save(state)
                    saved, saved_at = state.step, time.monotonic()
                    yield Saved(step=state.step, bytes=size)
            if state.step > 0 and not self._measured():
                yield from self._measure()              # it ended between two evaluations
        finally:
            if state.step > saved and self.whole:
                log.info("WanLite: saving %.1f GiB", size_of(state) / 2**30)
                self.files.save(state)

    def _may_spill(self) -> bool:
        """Windows alone does, when the card is full; there has to be something left to do about it, and steps that are alike."""
        if self.teacher.device.type != "cuda" or os.name != "nt" or len(self.budget.rungs) == 1 or self.job.matching or self.job.recipe.own_states:
            return False
        free, total = torch.cuda.mem_get_info(self.teacher.device)
        return free < FULL * total

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

    def _step(self) -> Generator[Event, None, Step]:
        """One optimizer step. Everything random in it is a function of (train_seed, step). It can be left after each pass until weights move."""
        begun, state, leg = time.monotonic(), self.state, self.course.at(self.state.step)
        lr = leg.lr(state.step, self.job.recipe)
        for group in state.optimizer.param_groups:
            group["lr"] = lr / self.learner.parts if state.released else lr
        try:
            with closing(self._gradients(state.step, leg.last)) as passes:
                for loss in passes:
                    if loss is not None:
                        norm = self._move(loss)
                    elif self.whole:
                        yield Stage(name="training", done=state.step, total=self.last)
        except Damaged as damaged:              # read before anything was computed
            yield from self._ask_again(damaged)
            return (yield from self._step())
        finally:
            state.optimizer.zero_grad(set_to_none=True)
        state.average.update(state.step)
        state.step, self.unbroken = state.step + 1, True
        return Step(step=state.step, total=self.last, loss=float(loss), grad_norm=float(norm), lr=lr, seconds=time.monotonic() - begun)

    @trains
    def _gradients(self, step: int, total: int) -> Generator[Tensor | None, None, None]:
        yield from self.learner.gradients(step, total)

    @trains
    def _move(self, loss: Tensor) -> Tensor:
        """A step along the gradients; returns their norm."""
        state = self.state
        if state.released:
            self.unbroken = False
        norm = state.released.norm() if state.released else clip_grad_norm_(state.trained.values(), self.job.recipe.max_grad_norm)
        if not torch.isfinite(loss + norm):
            raise WanLiteError(f"The loss is not finite at step {state.step + 1}.", "What is on disk is from before it.",
                               "Lower the learning rate and type a new run name.")
        self.unbroken = False
        if not state.released:
            state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        return norm

    @property
    def whole(self) -> bool:
        """Whether the state is that after a step, not in the middle of one."""
        return self.unbroken and not (self.state and self.state.released and self.state.released.moved)

    @trains
    def _trial(self, number: int) -> Iterator[Event]:
        """A step's work without moving a weight, to measure its speed."""
        for group in self.state.optimizer.param_groups:
            group["lr"] = 0.0
        for loss in self.learner.gradients(number, TIMED_STEPS):
            if loss is not None:
                self._move(loss)
                float(loss)             # a GPU's clock is read once all is done
            yield Stage(name="measuring the speed", done=number, total=TIMED_STEPS)

    def _measure(self) -> Iterator[Event]:
        """Evaluates the averaged weights, keeps them when they are the best so far, and draws a sample when asked to."""
        state = self.state
        with state.average.in_place():
            held = yield from self._evaluate(EVALUATING)
        best = self._keep_if_best(held.error)
        self.files.log(kind="eval", step=state.step, best=best, **asdict(held))
        yield Eval(step=state.step, held=held, plain_cut=self.plain, best=best)
        if self.samples:
            with state.average.in_place():
                latents, teacher = yield from self._draw()
            yield Sample(step=state.step, latents=latents, teacher=teacher)

    def _keep_if_best(self, error: float) -> bool:
        state = self.state
        if not error < state.best_error:
            return False
        state.best_error, state.best_step = error, state.step
        self.files.save_best(state)
        return True

    def _draw(self) -> Generator[Event, None, tuple[Tensor, Tensor | None]]:
        """A sample of the first held-out prompt as the student will be used, and the teacher's from the same noise: [1, C, T, H, W] each."""
        unit = self.cache.held[0]
        x, teacher = yield from self._read(lambda: self.cache.sample(unit, self.latents))
        return (yield from staged(DRAWING, draw(self.state.student, x, self.prompts, unit.prompt, self.job))), teacher
