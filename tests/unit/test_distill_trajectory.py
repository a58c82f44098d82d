"""Trajectory KD: steps of the student's own on the teacher's path, and teachers that are few-step models themselves."""
import dataclasses

import pytest
import torch
from helpers_compress import result_of
from helpers_tiny import random_bank, random_teacher

from wanlite_model import flow
from wanlite_model.distill.data import TeacherCache, plan_units
from wanlite_model.distill.paths import rollout_sigmas, state_counts, student_sigmas
from wanlite_model.distill.evaluate import evaluate
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.presets import PRESETS
from wanlite_model.errors import WanLiteError
from wanlite_model.teacher import guided_velocity

SHAPE = (16, 2, 4, 4)


def make_job(teacher, bank, recipe=None, **changes):
    settings = {"objective": "trajectory", "student_steps": 2, "teacher_steps": 6, "batch_size": 8, **(recipe or {})}
    return DistillJob(**{"student": "s", "teacher": teacher.fingerprint, "prompts": bank.fingerprint, "shape": SHAPE, "shift": teacher.shift,
                         "cfg": 3.0, "steps": 4, "recipe": Recipe(**settings), **changes})


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    teacher, bank = random_teacher(depth=2), random_bank(3)
    job = make_job(teacher, bank)
    cache = TeacherCache(tmp_path_factory.mktemp("cache"), job, plan_units(job, bank, None))
    list(cache.fill(teacher, bank, None))
    return teacher, bank, job, cache


@pytest.mark.parametrize("steps, parts", [(4, 3), (8, 2), (3, 5)])
def test_a_finer_path_goes_through_the_students_own_points(steps, parts):
    coarse = flow.schedule(steps, 5.0)
    fine = flow.subdivided(coarse, parts, 5.0)
    assert len(fine) == steps * parts + 1 and torch.equal(fine[::parts], coarse) and bool((fine.diff() < 0).all())
    if 1000 % (steps * parts) == 0:
        torch.testing.assert_close(fine, flow.schedule(steps * parts, 5.0))
    assert torch.equal(flow.subdivided(coarse, 1, 5.0), coarse)


def test_the_answers_are_the_average_velocities_of_the_teachers_guided_path(filled):
    teacher, bank, job, cache = filled
    unit = cache.train[0]
    sigmas = rollout_sigmas(job)
    assert len(sigmas) == 7 and torch.equal(sigmas[::3], student_sigmas(job))
    noise = cache._piece(unit, 0)["x"]
    path = [x for x, _, _ in flow.euler_steps(lambda x, s: guided_velocity(teacher, x, s, bank.cond([unit.prompt]), bank.negative_cond([unit.prompt]), 3.0), noise, sigmas)]
    for k, after in ((0, 3), (1, 3), (3, 6), (5, 6)):
        piece = cache._piece(unit, k)
        torch.testing.assert_close(piece["x"], path[k], atol=3e-3, rtol=0)
        torch.testing.assert_close(piece["goal"], path[after], atol=3e-3, rtol=0)
        torch.testing.assert_close(piece["x"] + (piece["following"] - piece["sigma"]) * piece["v_pos"], piece["goal"], atol=1e-5, rtol=0)


def test_the_shares_of_the_recipe_say_where_steps_begin(filled):
    teacher, bank, job, cache = filled
    grid = set(student_sigmas(job).tolist())

    def drawn(**shares):
        cache.job = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, batch_size=60, **shares))
        return cache.batch(0)

    try:
        on_grid = drawn(full_range=0.0, own_states=0.0)
        assert set(on_grid.sigma.tolist()) <= grid and not on_grid.rolled.any()
        anywhere = drawn(full_range=1.0, own_states=1.0)
        assert not set(anywhere.sigma.tolist()) <= grid and not anywhere.rolled.any()
        own = drawn(full_range=0.0, own_states=1.0)
        assert torch.equal(own.rolled > 0, own.sigma < 1)       # the first step always starts from noise
    finally:
        cache.job = job


def test_a_student_that_takes_the_teachers_steps_has_no_error_left(filled):
    """The random teacher's own path is not straight, so its single steps are off by what the average velocity is there to mend."""
    teacher, bank, job, cache = filled
    one = dataclasses.replace(job, cfg=1.0, recipe=dataclasses.replace(job.recipe, student_steps=6))
    exact = TeacherCache(cache.root, one, plan_units(one, bank, None))
    list(exact.fill(teacher, bank, None))
    held = result_of(evaluate(teacher.module, exact.held_out(), bank, one, exact.held_out_paths()))
    assert held.error < 1e-5
    assert result_of(evaluate(teacher.module, cache.held_out(), bank, job, cache.held_out_paths())).error > 1e-4


def test_a_few_step_teacher_is_asked_at_its_own_sigmas_alone():
    teacher, bank = random_teacher(depth=1), random_bank(3)
    few = make_job(teacher, bank, {"objective": "velocity", "teacher_steps": 4, "renoised": 0.7}, cfg=1.0)
    assert few.grid_only and not make_job(teacher, bank, {"objective": "velocity", "teacher_steps": 4}).grid_only
    assert not make_job(teacher, bank, {"objective": "velocity", "teacher_steps": 20}, cfg=1.0).grid_only


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_asks_a_few_step_teacher_for_its_own_steps_and_no_more(tmp_path, preset):
    teacher, bank = random_teacher(depth=1), random_bank(3)
    recipe = {**dataclasses.asdict(PRESETS[preset].recipe), "teacher_steps": 4}
    job = make_job(teacher, bank, recipe, cfg=1.0, fold_guidance=PRESETS[preset].fold_guidance)
    assert job.student_steps == 4 and sum(state_counts(job)) == 4
    torch.testing.assert_close(rollout_sigmas(job), flow.schedule(4, job.shift))
    cache = TeacherCache(tmp_path, job, plan_units(job, bank, None)[:2])
    list(cache.fill(teacher, bank, None))
    assert {round(s, 5) for unit in cache.units for s in cache._sigmas(unit)} <= {round(s, 5) for s in rollout_sigmas(job).tolist()}


def test_what_cannot_be_is_refused_in_words():
    teacher, bank = random_teacher(depth=1), random_bank(3)
    for its, ours, fits in ((6, 4, False), (8, 5, False), (6, 3, True), (8, 4, True), (4, 8, True)):
        def stepped(cfg):
            return make_job(teacher, bank, {"teacher_steps": its, "student_steps": ours}, cfg=cfg)
        assert stepped(3.0).path_steps                  # one with guidance can be asked anywhere
        if fits:
            assert stepped(1.0).path_steps == its
        else:
            with pytest.raises(WanLiteError, match=f"{its} steps without cfg.* {ours}"):
                stepped(1.0)
    with pytest.raises(WanLiteError, match="holds clips"):
        make_job(teacher, bank, latents="abc")
    with pytest.raises(WanLiteError, match="guidance is to be kept"):
        make_job(teacher, bank, fold_guidance=False)


def test_presets_are_what_their_names_say():
    assert {name: preset.recipe.student_steps for name, preset in PRESETS.items() if preset.recipe.objective == "trajectory"} == {
        "few-step 8": 8, "few-step 4": 4, "image": 8}
    assert all(preset.recipe.rank for name, preset in PRESETS.items() if "LoRA" in preset.told)
    assert not any(preset.recipe.rank for name, preset in PRESETS.items() if "LoRA" not in preset.told)
    assert [name for name, preset in PRESETS.items() if not preset.fold_guidance] == ["keep-cfg"] and PRESETS["image"].frames == 1
