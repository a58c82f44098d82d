"""Two experts: the teacher's paths run through both, each student is taught and measured on its own side, and one cache serves both jobs."""
import dataclasses

import pytest
import torch
from helpers_compress import CountingTeacher, result_of
from helpers_distill import RECIPE, SHAPE, until
from helpers_tiny import random_bank, random_wan

from wanlite_model import flow
from wanlite_model.compress.build import create_student
from wanlite_model.compress.importance import make_probe
from wanlite_model.distill import inputs
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.data import REUSE, TeacherCache, plan_units
from wanlite_model.distill.events import Eval, Finished, Sample, Step
from wanlite_model.distill.inputs import Inputs
from wanlite_model.distill.job import DistillJob
from wanlite_model.distill.paths import asked_of, own_sigmas, own_turns, rollout_sigmas, seeded, student_sigmas, taught_states
from wanlite_model.distill.trainer import run
from wanlite_model.errors import WanLiteError
from wanlite_model.experts import ExpertPair, Other
from wanlite_model.roles import OVERLAP, Role
from wanlite_model.teacher import guided_velocity

SHIFT, BOUNDARY, STEPS, CFG = 3.0, 0.7, 6, 3.0
VELOCITY = {"teacher_steps": STEPS, "renoised": 0.6}
TRAJECTORY = {"objective": "trajectory", "student_steps": STEPS, "teacher_steps": 2 * STEPS, "own_states": 0.5}


class Pair:
    """Two experts of random weights, a student of each, and jobs for them."""

    def __init__(self, folder):
        self.folder, self.bank = folder, random_bank(4)
        self.teachers = {side: CountingTeacher(random_wan(seed), shift=SHIFT, name=side) for seed, side in enumerate(("high", "low"))}
        self.students = {side: self.create(side, method="interleaved") for side in self.teachers}

    def other(self, side):
        return Other(teacher=self.teachers["low" if side == "high" else "high"], role=Role(side=side, boundary=BOUNDARY))

    def create(self, side, **given):
        return result_of(create_student(self.teachers[side], self.bank, SHAPE, **{"depth": 4, "other": self.other(side), **given}, cfg=CFG,
                                        folder=self.folder / "starts"))[0]

    def job(self, side, recipe=VELOCITY, **changes):
        return DistillJob(**{"student": self.students[side].fingerprint, "teacher": self.teachers[side].fingerprint, "role": self.other(side).role,
                             "other": self.other(side).teacher.fingerprint, "prompts": self.bank.fingerprint, "shape": SHAPE, "shift": SHIFT, "cfg": CFG,
                             "steps": 8, "recipe": dataclasses.replace(RECIPE, **recipe), **changes})

    def cache(self, job):
        return TeacherCache(self.folder / "cache", job, plan_units(job, self.bank, None))

    def fill(self, job):
        side, cache = job.role.side, self.cache(job)
        list(cache.fill(asked_of(job, self.teachers[side], self.other(side).teacher), self.bank, None))
        return cache

    def events(self, job, name, **options):
        side = job.role.side
        return run(job, self.folder / name, self.folder / "cache", self.teachers[side], self.students[side], self.bank, other=self.other(side).teacher, **options)

    def forwards(self):
        return {side: teacher.forwards for side, teacher in self.teachers.items()}

    def guided(self, side, x, sigma, which):
        return guided_velocity(self.teachers[side], x, sigma, self.bank.cond(which), self.bank.negative_cond(which), CFG)

    def path(self, noise, prompt, sigmas):
        """The stock two-sampler graph, by hand: Euler along one schedule, the high expert's steps first."""
        x, points = noise, [noise]
        for sigma, following in zip(sigmas[:-1], sigmas[1:]):
            v = self.guided("high" if sigma >= BOUNDARY else "low", x, sigma.expand(1), [prompt])
            x = flow.euler_step(x, v, sigma, following)
            points.append(x)
        return points


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("recipe", [VELOCITY, TRAJECTORY])
def test_the_teachers_path_runs_through_both_and_one_cache_serves_both_jobs(tmp_path, recipe):
    pair = Pair(tmp_path)
    before = pair.forwards()
    cache = pair.fill(pair.job("high", recipe))
    assert all(pair.forwards()[side] > before[side] for side in before)
    asked = pair.forwards()
    lows = pair.fill(pair.job("low", recipe))
    assert pair.forwards() == asked and [unit.key for unit in lows.units] == [unit.key for unit in cache.units]
    unit, sigmas = cache.train[0], rollout_sigmas(cache.job)
    wanted = pair.path(cache._read(unit, 0)[0]["x"], unit.prompt, sigmas)
    for k in range(len(sigmas) - 1):
        torch.testing.assert_close(cache._read(unit, k)[0]["x"], wanted[k], atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize("side", ["high", "low"])
def test_an_expert_is_taught_its_own_teachers_answers_on_its_own_side(pair, side):
    job = pair.job(side, {**VELOCITY, "batch_size": 64})
    cache = pair.fill(job)
    batch = cache.batch(0)
    beyond = ~job.role.owns(batch.sigma)
    assert 0 < int(beyond.sum()) < 16 and (batch.sigma[beyond] - BOUNDARY).abs().max() <= OVERLAP
    on_path = torch.isin(batch.sigma, student_sigmas(job))
    assert 10 < int(on_path.sum()) < 50 and set(batch.sigma[on_path].tolist()) == set(student_sigmas(job)[list(own_turns(job))].tolist())
    right = pair.guided(side, batch.x, batch.sigma, batch.prompts)
    wrong = pair.guided("low" if side == "high" else "high", batch.x, batch.sigma, batch.prompts)
    torch.testing.assert_close(batch.guided(CFG), right, atol=2e-2, rtol=1e-2)
    assert (wrong - right).norm() > 0.5 * right.norm()
    held = cache.held_out()
    assert (job.role.owns(held.sigma) | ((held.sigma - BOUNDARY).abs() <= OVERLAP)).all()


@pytest.mark.parametrize("recipe", [VELOCITY, TRAJECTORY])
@pytest.mark.parametrize("side", ["high", "low"])
def test_an_expert_sees_its_states_as_often_as_a_whole_wan_does(pair, side, recipe):
    """The states of the other side are in the same files, and do not count."""
    job = pair.job(side, recipe, steps=200)
    units = plan_units(job, pair.bank, None)
    taught = sum(len(states) for unit in units for states in taught_states(job, unit.index))
    assert job.steps * job.recipe.batch_size / taught == pytest.approx(REUSE, rel=0.1)


@pytest.mark.parametrize("side", ["high", "low"])
def test_the_steps_of_an_expert_are_those_on_its_side(pair, side):
    job = pair.job(side, {**TRAJECTORY, "batch_size": 64, "full_range": 0.3})
    cache, turns, sigmas = pair.fill(job), own_turns(job), student_sigmas(job)
    assert [bool(value >= BOUNDARY) for value in sigmas[:-1]] == [turn in turns if side == "high" else turn not in turns for turn in range(STEPS)]
    batch = cache.batch(0)
    assert job.role.owns(batch.sigma).all() and batch.rolled.max() == len(turns) - 1 and not torch.isin(batch.sigma, sigmas).all()
    first = 2 * turns.start
    for row in batch.rolled.nonzero().flatten().tolist():
        assert any(torch.equal(batch.x[row], cache._read(unit, first)[0]["x"][0]) for unit in cache.train)
        assert batch.sigma[row] == own_sigmas(job)[batch.rolled[row]]
    paths = cache.held_out_paths()
    unit = cache.held[0]
    assert torch.equal(paths.x[:1], cache._read(unit, first)[0]["x"]) and torch.equal(paths.goal[:1], cache._read(unit, 2 * turns.stop)[0]["x"])
    assert paths.sigma[0] == sigmas[turns.start] and paths.following[0] == sigmas[turns.stop]


@pytest.mark.parametrize("side, recipe", [
    ("high", {**VELOCITY, "rank": 4}), ("low", VELOCITY), ("high", TRAJECTORY), ("low", TRAJECTORY), ("low", {**VELOCITY, "own_states": 0.5}),
    ("high", {**VELOCITY, "objective": "velocity + features"})])
def test_an_expert_learns_and_says_what_it_is(pair, side, recipe):
    job = pair.job(side, {**recipe, "learning_rate": 1e-3, "evaluations": 2}, steps=20)
    name = f"learns {side} {sorted(map(str, recipe.items()))}"[:60].replace(":", "").replace("'", "")
    events = list(pair.events(job, name, samples=True))
    finished = events[-1]
    assert isinstance(finished, Finished)
    errors = [event.held.error for event in events if isinstance(event, Eval)]
    start = RunFolder(pair.folder / name).noted("baseline")["start"]["error"]
    assert min(errors) < 0.9 * start
    card = finished.handle.card
    assert (card.expert, card.boundary, card.steps) == (side, BOUNDARY, STEPS)
    turns = own_turns(job)
    assert f"expert of {side} noise: of the {STEPS} steps it makes {turns.start} to {turns.stop} " in finished.report
    sample, unit = next(event for event in events if isinstance(event, Sample)), pair.cache(job).held[0]
    sigmas = rollout_sigmas(job)
    points = pair.path(torch.randn(1, *SHAPE, generator=seeded(0, "rollout", unit.index)), unit.prompt, sigmas)
    at = turns.stop * job.substeps
    expected = points[-1]
    if side == "high":                  # the clip that is seen where the other one takes over
        expected = flow.denoised(points[at], (points[at + 1] - points[at]) / (sigmas[at + 1] - sigmas[at]), sigmas[at:at + 1])
    torch.testing.assert_close(sample.teacher, expected, atol=2e-2, rtol=2e-2)
    assert sample.latents.shape == (1, *SHAPE) and torch.isfinite(sample.latents).all()


@pytest.mark.parametrize("side", ["high", "low"])
def test_an_experts_run_goes_on_bit_for_bit(pair, side):
    job = pair.job(side, {**TRAJECTORY, "save_every": 1e6})
    straight = list(pair.events(job, f"straight {side}"))[-1]
    until(pair.events(job, f"stopped {side}"), lambda event: isinstance(event, Step) and event.step == 3)
    again = list(pair.events(job, f"stopped {side}"))[-1]
    assert isinstance(again, Finished) and again.losses == straight.losses and again.handle.fingerprint == straight.handle.fingerprint


@pytest.mark.parametrize("side", ["high", "low"])
def test_a_start_is_judged_on_its_own_side(pair, side):
    other = pair.other(side)
    probe = result_of(make_probe(other.beside(pair.teachers[side]), pair.bank, SHAPE, seed=0, count=24, cfg=CFG, each=2, renoised=1, role=other.role))
    assert len(probe.x) == 24 and other.role.owns(probe.sigma).all() and len(set(probe.sigma.tolist())) > 6
    before = pair.forwards()
    result_of(make_probe(other.beside(pair.teachers[side]), pair.bank, SHAPE, seed=0, count=4, cfg=CFG, role=other.role))
    asked = {which: pair.forwards()[which] - before[which] for which in before}
    assert asked["high"] > 0 and (asked["low"] > 0) == (side == "low")          # what follows the high one's last step is nobody's
    student = pair.create(side, method="greedy", block_steps=5, depth=3)
    assert student.card.expert == side and student.card.measured["start_error"] < student.card.measured["plain_cut_error"]
    assert pair.create(side, method="greedy", block_steps=5, depth=3).folder == student.folder
    alone = result_of(create_student(pair.teachers[side], pair.bank, SHAPE, depth=3, method="greedy", block_steps=5, cfg=CFG, folder=pair.folder / "starts"))[0]
    assert alone.fingerprint != student.fingerprint and alone.card.expert == ""


def test_a_prepared_run_has_both_experts_in_its_folder(pair):
    job, files = pair.job("low", steps=3), RunFolder(pair.folder / "prepared")
    parts = Inputs(student=pair.students["low"], prompts=pair.bank)
    list(inputs.prepare(files, job, parts, pair.teachers["low"], pair.folder / "fresh cache", other=pair.teachers["high"]))
    device = torch.device("cpu")
    teacher, other = inputs.teacher_of(files, job, device), inputs.teacher_of(files, job, device, which=inputs.OTHER)
    alike = zip(other.weights(), pair.teachers["high"].weights())
    assert all(ours[0] == its[0] and torch.equal(ours[1], its[1]) for ours, its in alike)
    headless = list(run(job, files.path, pair.folder / "fresh cache", teacher, parts.student, parts.prompts, other=other))[-1]
    here = list(pair.events(job, "here"))[-1]
    assert headless.losses == here.losses


def test_what_could_not_be_run_is_not_prepared(pair):
    job, files = pair.job("low"), RunFolder(pair.folder / "half prepared")
    parts = Inputs(student=pair.students["low"], prompts=pair.bank)
    with pytest.raises(WanLiteError, match="was given none"):
        next(inputs.prepare(files, job, parts, pair.teachers["low"], pair.folder / "cache"))
    with pytest.raises(WanLiteError, match="The job was made for teacher"):
        next(inputs.prepare(files, job, parts, pair.teachers["high"], pair.folder / "cache", other=pair.teachers["low"]))
    assert not files.path.exists()


def test_the_pair_answers_each_state_by_its_own_expert(pair):
    both = ExpertPair(pair.teachers["high"], pair.teachers["low"], BOUNDARY)
    x, sigma, cond = torch.randn(3, *SHAPE), torch.tensor([0.9, 0.2, BOUNDARY]), pair.bank.cond([0, 1, 2])
    v = both.velocity(x, sigma, cond)
    high, low = (pair.teachers[side].velocity(x, sigma, cond) for side in ("high", "low"))
    torch.testing.assert_close(v, torch.stack([high[0], low[1], high[2]]), atol=1e-5, rtol=1e-4)


def wrong_jobs(pair):
    unlike, shifted = CountingTeacher(random_wan(depth=2), shift=SHIFT), CountingTeacher(random_wan(7), shift=5.0)
    return {
        "twice the same": (lambda: ExpertPair(pair.teachers["high"], pair.teachers["high"], BOUNDARY), "same weights"),
        "another size": (lambda: ExpertPair(pair.teachers["high"], unlike, BOUNDARY), "differ in their architecture"),
        "another shift": (lambda: ExpertPair(pair.teachers["high"], shifted, BOUNDARY), "differ in their shift"),
        "all steps on one side": (lambda: own_turns(pair.job("low", shift=100.0)), "lie on one side of the boundary"),
        "no boundary": (lambda: Role(side="high", boundary=1.0), "between 0 and 1"),
        "distribution": (lambda: pair.job("high", {"objective": "distribution", "rank": 4}), "one of two experts"),
        "clips and own states": (lambda: pair.job("low", {"own_states": 0.5}, latents="x"), "with clips there is no path"),
        "no other expert": (lambda: next(iter(run(pair.job("low"), pair.folder / "none", pair.folder / "cache", pair.teachers["low"], pair.students["low"],
                                                  pair.bank))), "given none"),
    }


@pytest.mark.parametrize("what", ["twice the same", "another size", "another shift", "all steps on one side", "no boundary", "distribution",
                                  "clips and own states", "no other expert"])
def test_what_cannot_be_two_experts_is_refused(pair, what):
    ask, words = wrong_jobs(pair)[what]
    with pytest.raises(WanLiteError, match=words):
        ask()


@pytest.mark.parametrize("side", ["high", "low"])
def test_a_few_step_teachers_clips_have_states_for_either_side(pair, side):
    """With clips and a teacher of four steps there is no path, and each clip is noised to each of the four levels once."""
    job = pair.job(side, {"teacher_steps": 4}, cfg=1.0, latents="x")
    latents = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    cache = TeacherCache(pair.folder / "clips", job, plan_units(job, pair.bank, latents))
    list(cache.fill(asked_of(job, pair.teachers[side], pair.other(side).teacher), pair.bank, latents))
    batch = [cache.batch(step) for step in range(8)]
    assert all(job.role.owns(part.sigma).all() for part in batch)


def test_the_experts_change_places_a_few_times_a_unit(pair):
    """Each change is a 14B that moves."""
    job = pair.job("high", VELOCITY)
    teachers, asked = {side: pair.teachers[side] for side in pair.teachers}, []
    both = asked_of(job, teachers["high"], teachers["low"])
    ready = both.ready
    both.ready = lambda teacher: asked.append(teacher.name) or ready(teacher)
    cache = TeacherCache(pair.folder / "places", job, plan_units(job, pair.bank, None)[:1])
    list(cache.fill(both, pair.bank, None))
    assert len(asked) > 12 and sum(a != b for a, b in zip(asked, asked[1:])) == 2 and asked[0] == asked[-1] == "high"


def test_of_a_batch_on_both_sides_the_expert_that_is_in_memory_is_asked_first(pair):
    both, asked = ExpertPair(pair.teachers["high"], pair.teachers["low"], BOUNDARY), []
    ready = both.ready
    both.ready = lambda teacher: asked.append(teacher.name) or ready(teacher)
    for sigmas in ([0.9, 0.2], [0.9, 0.2]):
        both.velocity(torch.randn(2, *SHAPE), torch.tensor(sigmas), pair.bank.cond([0, 1]))
    assert asked == ["high", "low", "low", "high"]


def test_what_is_asked_again_leaves_no_expert_in_memory_that_no_step_asks(pair, monkeypatch, tmp_path):
    """At each step the student's own teacher is asked, and stays; the other one comes back for what was damaged alone."""
    job, released = pair.job("high", {**VELOCITY, "own_states": 0.5}), []
    monkeypatch.setattr(pair, "folder", tmp_path)
    going = pair.events(job, "run")
    next(event for event in going if isinstance(event, Step))
    for side, teacher in pair.teachers.items():
        monkeypatch.setattr(teacher, "release", lambda needed=0, side=side: released.append((side, teacher.forwards)), raising=False)
    for path in (tmp_path / "cache").glob("*.safetensors"):
        path.write_bytes(b"torn")
    assert isinstance(list(going)[-1], Finished) and ("low", pair.teachers["low"].forwards) in released


def test_another_side_or_boundary_is_another_job(pair):
    from wanlite_model.distill.job import differences
    job = pair.job("high")
    assert differences(job, dataclasses.replace(job, role=Role(side="low", boundary=BOUNDARY))) == ["role=high, not low"]
    assert differences(job, dataclasses.replace(job, role=Role(side="high", boundary=0.8))) == ["boundary=0.7, not 0.8"]
    assert DistillJob.from_json(job.to_json()) == job
