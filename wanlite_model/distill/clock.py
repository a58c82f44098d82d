"""How long a job still takes, told from its events: by arithmetic until something was measured, then by what was measured."""
from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from .data import HELD_STATES
from .events import ASKING, DRAWING, EVALUATING, Eval, Event, Finished, Planned, Sample, Stage, Step
from .job import DistillJob

LATEST = 20                     # answers and steps that a speed is read from
AT_ONCE = 1e-3                  # seconds: an answer that takes less was there already
FORWARDS = 3                    # that a step of one state is worth: its own, and a backward of two


class Clock:
    """Give it each event as it comes. now: seconds, of any beginning."""

    def __init__(self, job: DistillJob, now: Callable[[], float] = time.monotonic) -> None:
        self._job, self._now, self._began = job, now, now()
        self._asked: deque[float] = deque(maxlen=LATEST)            # seconds an answer
        self._stepped: deque[float] = deque(maxlen=LATEST)          # seconds a step
        self._measured: deque[float] = deque(maxlen=3)              # seconds of an evaluation with what is drawn at it
        self._answer: tuple[int, float] | None = None
        self._answers = self._steps = self._evaluations = 0         # that are still to come
        self._asking = self._predicted = 0.0                        # seconds of all answers, and a step, by arithmetic
        self._before = self._began                                  # when an evaluation would have begun
        self._over = False

    def take(self, event: Event) -> None:
        now = self._now()
        if isinstance(event, Planned):
            self._steps, self._evaluations = event.steps, event.evaluations
            self._asking, self._predicted = event.budget.asking_seconds, event.budget.step_seconds
            self._stepped.clear()
        elif isinstance(event, Stage):
            if event.name == ASKING:
                self._count(event, now)
            if event.name not in (EVALUATING, DRAWING):
                self._before = now
        elif isinstance(event, Step):
            self._answers, self._asking, self._before = 0, 0.0, now
            self._steps = event.total - event.step
            self._stepped.append(event.seconds)
        elif isinstance(event, Eval):
            self._measured.append(now - self._before)
            self._evaluations = max(0, self._evaluations - 1)
        elif isinstance(event, Sample) and self._measured:
            self._measured[-1] = now - self._before
        elif isinstance(event, Finished):
            self._over = True

    @property
    def left(self) -> float | None:
        """Seconds, as far as they can be told now; None before anything is planned, and of a job that is over."""
        if self._over or not self._predicted:
            return None
        if self._job.steps == 0 and not self._steps and not self._stepped:
            return max(0.0, 60 * self._job.minutes - (self._now() - self._began))
        each = statistics.fmean(self._stepped) if self._stepped else self._predicted
        evaluation = statistics.fmean(self._measured) if self._measured else each * HELD_STATES / (FORWARDS * self._job.recipe.batch_size)
        asking = self._answers * statistics.median(self._asked) if self._asked else self._asking
        return asking + self._steps * each + (1 + self._evaluations) * evaluation           # the last one is of what is handed out

    def _count(self, event: Stage, now: float) -> None:
        """Answers that were there already come in no time, and tell nothing of those that are still to be asked for."""
        self._answers = event.total - event.done
        if self._answer is not None and event.done > self._answer[0]:
            each = (now - self._answer[1]) / (event.done - self._answer[0])
            if each > AT_ONCE:
                self._asked.append(each)
        self._answer = event.done, now
