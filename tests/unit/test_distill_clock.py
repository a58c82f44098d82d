"""How long a job still takes, as its events tell it, by a clock that stands still unless it is moved."""
from types import SimpleNamespace

import pytest

from wanlite_model.distill.clock import Clock
from wanlite_model.distill.data import HELD_STATES
from wanlite_model.distill.events import Eval, Finished, Planned, Sample, Stage, Step
from wanlite_model.distill.job import DistillJob, Recipe

RECIPE = Recipe(batch_size=4, evaluations=2)
EVALUATION = HELD_STATES / (3 * RECIPE.batch_size)          # in steps: a forward of each state, where a step of four is worth twelve


class Timed:
    """A clock that a test moves, and events that come at its time."""

    def __init__(self, **length):
        self.now = 1000.0
        self.clock = Clock(DistillJob(student="s", teacher="t", prompts="p", shape=(16, 2, 4, 4), shift=5.0, recipe=RECIPE, **length), lambda: self.now)
        self.plan(length.get("steps", 0), evaluations=2)

    def plan(self, steps, evaluations):
        self.clock.take(Planned(budget=SimpleNamespace(step_seconds=2.0, asking_seconds=90.0), told="", steps=steps, evaluations=evaluations))

    def ask(self, done, total, after):
        self.now += after
        self.clock.take(Stage(name="asking the teacher", done=done, total=total))

    def step(self, step, total, seconds):
        self.now += seconds
        self.clock.take(Step(step=step, total=total, loss=1.0, grad_norm=1.0, lr=1.0, seconds=seconds))

    def evaluate(self, step, seconds):
        self.now += seconds
        self.clock.take(Eval(step=step, held=None, plain_cut=None, best=True))


def test_before_anything_was_measured_it_is_arithmetic():
    assert Timed(steps=100).clock.left == pytest.approx(90 + 2.0 * (100 + 3 * EVALUATION))        # two evaluations, and one of what is handed out


def test_while_the_teacher_is_asked_its_answers_are_counted_and_those_that_were_there_are_not():
    timed = Timed(steps=100)
    timed.ask(0, 40, after=0)
    timed.ask(30, 40, after=0.01)           # they were there: a third of a millisecond each
    assert timed.clock.left == pytest.approx(90 + 2.0 * (100 + 3 * EVALUATION))
    timed.ask(31, 40, after=5)
    timed.ask(33, 40, after=10)
    assert timed.clock.left == pytest.approx(7 * 5 + 2.0 * (100 + 3 * EVALUATION))


def test_once_it_trains_it_is_what_steps_and_evaluations_took():
    timed = Timed(steps=100)
    timed.ask(1, 40, after=5)
    for step in range(1, 51):
        timed.step(step, 100, seconds=0.5)
    timed.evaluate(50, seconds=7)
    assert timed.clock.left == pytest.approx(50 * 0.5 + (1 + 1) * 7)
    timed.now += 13
    timed.clock.take(Sample(step=50, latents=None, teacher=None))                # what is drawn at an evaluation, and decoded, is part of it
    assert timed.clock.left == pytest.approx(50 * 0.5 + (1 + 1) * 20)
    for step in range(51, 101):
        timed.step(step, 100, seconds=1.0)
    timed.evaluate(100, seconds=10)
    assert timed.clock.left == pytest.approx(15)


def test_a_job_of_minutes_takes_what_is_left_of_them_until_they_are_steps():
    timed = Timed(minutes=30.0)
    assert timed.clock.left == 1800
    timed.ask(3, 40, after=60)
    assert timed.clock.left == 1740
    timed.step(1, 200, seconds=4.0)
    assert timed.clock.left == pytest.approx(199 * 4.0 + 3 * 4.0 * EVALUATION)


def test_a_run_that_goes_on_counts_what_is_left_of_it_and_no_loading_as_an_evaluation():
    timed = Timed(minutes=300.0)
    timed.plan(20, evaluations=1)
    assert timed.clock.left == pytest.approx(90 + 2.0 * (20 + 2 * EVALUATION))          # not all of the minutes again
    timed.now += 500
    timed.clock.take(Stage(name="loading the student", done=0, total=1))
    timed.clock.take(Stage(name="evaluating", done=1, total=2))
    timed.evaluate(180, seconds=6)
    assert timed.clock.left == pytest.approx(90 + 2.0 * 20 + 6)
    for step in range(181, 184):
        timed.step(step, 200, seconds=1.0)
    timed.plan(17, evaluations=1)                       # it did not fit, and goes on in another way: at another speed
    assert timed.clock.left == pytest.approx(90 + 2.0 * 17 + 2 * 6)


def test_nothing_is_told_before_the_plan_and_after_the_end():
    timed = Timed(steps=10)
    assert Clock(DistillJob(student="s", teacher="t", prompts="p", shape=(16, 2, 4, 4), shift=5.0, steps=10)).left is None
    timed.clock.take(Finished(handle=None, report="", losses=(), evaluations=(), plain_cut=1.0, yardstick=""))
    assert timed.clock.left is None
