"""Students that are told pictures learn from teachers that are: every objective, its resume, its cache, its memory, and a run without ComfyUI."""
import dataclasses
import shutil

import pytest
import torch
from helpers_compress import result_of
from helpers_distill import same, until
from helpers_pictures import FIELDS, TOLD, picture_bank, pictures, shape_of, with_shown
from helpers_tiny import random_teacher
from safetensors.torch import load_file

from wanlite_model import cli, flow
from wanlite_model.compress.build import create_student
from wanlite_model.distill import data, inputs, matching
from wanlite_model.distill.budget import predicted
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.data import TeacherCache, latents_fingerprint, plan_units
from wanlite_model.distill.dry import dry_run
from wanlite_model.distill.evaluate import evaluate, roll, student_velocity
from wanlite_model.distill.events import Stage, Step
from wanlite_model.distill.inputs import Inputs
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.levers import Levers
from wanlite_model.distill.live import LiveBytes
from wanlite_model.distill.paths import state_counts, student_sigmas
from wanlite_model.distill.trainer import Run, run
from wanlite_model.errors import WanLiteError
from wanlite_model.prompts import PromptBank
from wanlite_model.roles import Role
from wanlite_model.teacher import FileTeacher, guided_velocity
from wanlite_model.transformer import WanLiteStudent

PROMPTS, TOKENS = 3, 7                  # CLIP tokens: 257 would be all of the time
RECIPE = Recipe(learning_rate=1e-3, batch_size=2, warmup=1, teacher_steps=2, student_steps=2, evaluations=1, ema_decay=0.5)
OBJECTIVES = {          # {name: (which student, recipe, job)}
    "velocity, LoRA": ("whole", {"rank": 4}, {}),
    "velocity + features": ("cut", {"objective": "velocity + features"}, {}),
    "trajectory from own states": ("cut", {"objective": "trajectory", "own_states": 0.5}, {}),
    "velocity at own states": ("cut", {"own_states": 0.5}, {}),
    "distribution": ("few", {"objective": "distribution", "rank": 4}, {}),
    "keep-cfg": ("cut", {}, {"fold_guidance": False}),
}


class Setting:
    """A tiny teacher of one kind with its prompts, and students: itself, a cut of it, and one that takes two steps."""

    def __init__(self, kind, folder, frames=2, prompts=PROMPTS):
        self.kind, self.folder, self.shape = kind, folder, shape_of(kind, frames)
        self.teacher = random_teacher(depth=2, **FIELDS[kind])
        self.bank = picture_bank(kind, prompts, self.shape, tokens=TOKENS)
        self.students = {}

    def student(self, name):
        if name not in self.students:
            if name == "few":
                job = self.job("whole", {"objective": "trajectory", "rank": 4, "teacher_steps": 2}, steps=2)
                made = list(self.events(job, "few"))[-1].handle
            else:
                made, _ = result_of(create_student(self.teacher, self.bank, self.shape, depth=1 if name == "cut" else None, method="interleaved",
                                                   folder=self.folder / "starts"))
            self.students[name] = made
        return self.students[name]

    def job(self, student, recipe={}, **changes):
        return DistillJob(**{"student": self.student(student).fingerprint, "teacher": self.teacher.fingerprint, "prompts": self.bank.fingerprint,
                             "shape": self.shape, "shift": 3.0, "cfg": 3.0, "steps": 3, "recipe": dataclasses.replace(RECIPE, **recipe), **changes})

    def parts(self, job, bank=None):
        handle = next(handle for handle in self.students.values() if handle.fingerprint == job.student)
        return self.folder / "cache", self.teacher, handle, bank or self.bank

    def events(self, job, name, bank=None, **options):
        return run(job, self.folder / name, *self.parts(job, bank), **options)

    def begun(self, job, name):
        """The learner before the first step."""
        running = Run(job, RunFolder(self.folder / name), *self.parts(job), None, lambda: False, False)
        (self.folder / name).mkdir()
        running.began = 0.0
        running.work = running._work()              # whose end would close what reads batches
        next(event for event in running.work if isinstance(event, Stage) and event.name == "evaluating the start")
        return running

    def cache(self, recipe={}, latents=None):
        job = self.job("cut", recipe, latents=latents_fingerprint(latents))
        filled = TeacherCache(self.folder / "cache", job, plan_units(job, self.bank, latents))
        list(filled.fill(self.teacher, self.bank, latents))
        return filled

    def state(self, name):
        return load_file(self.folder / name / "checkpoint.safetensors")


@pytest.fixture(scope="module", autouse=True)
def few_units():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "MIN_UNITS", 4)
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = Setting(kind, tmp_path_factory.mktemp("pictures"))
        return made[kind]
    return of


# ---- every objective


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["2.1 I2V", "2.2 I2V", "TI2V"])
def test_every_objective_trains_and_goes_on_where_it_stopped(settings, kind, objective):
    setting = settings(kind)
    student, recipe, changes = OBJECTIVES[objective]
    job = setting.job(student, recipe, **changes)
    planned, *_, end = setting.events(job, objective)
    assert planned.budget.peaks and len(end.losses) == 3 and all(0 < loss < 10 for loss in end.losses) and [step for step, _ in end.evaluations] == [3]
    until(setting.events(job, f"{objective} halted"), lambda event: isinstance(event, Step) and event.step == 2)
    assert [event.step for event in setting.events(job, f"{objective} halted") if isinstance(event, Step)] == [3]
    assert same(setting.state(objective), setting.state(f"{objective} halted"))
    assert end.handle.config.model_type == FIELDS[kind]["model_type"]


@pytest.mark.parametrize(("kind", "recipe"), [("2.2 I2V", {}), ("TI2V", {"objective": "trajectory", "learning_rate": 5e-4}), ("FLF2V", {})], ids=str)
def test_the_held_out_error_falls_below_that_of_the_plain_cut(tmp_path, kind, recipe):
    setting = Setting(kind, tmp_path)
    job = setting.job("cut", {"learning_rate": 5e-4, "batch_size": 4, **recipe}, steps=40)
    *_, end = setting.events(job, "falls")
    assert end.evaluations[-1][1] < 0.7 * end.plain_cut, (end.evaluations, end.plain_cut)


# ---- what the teacher is asked, once


@pytest.mark.parametrize("kind", ["2.1 I2V", "2.2 I2V", "TI2V"])
def test_cached_answers_are_the_teachers_with_each_prompts_own_pictures(settings, kind):
    setting = settings(kind)
    batch, bank = setting.cache().batch(0), setting.bank

    def off(shown):
        texts = bank.cond(batch.prompts), bank.negative_cond(batch.prompts)
        positive, negative = (dataclasses.replace(bank.cond(shown), context=told.context) for told in texts)
        expected = guided_velocity(setting.teacher, batch.x, batch.sigma, positive, negative, 3.0)
        return (batch.guided(3.0) - expected).abs().max() / expected.abs().max()

    assert off(batch.prompts) < 0.01 < 0.02 < off([(index + 1) % PROMPTS for index in batch.prompts])


@pytest.mark.parametrize("objective", ["velocity", "trajectory", "velocity on clips"])
def test_answers_in_given_frames_are_zero_and_a_path_keeps_them(settings, objective):
    setting = settings("TI2V")
    clips = torch.randn(PROMPTS, *setting.shape) if "clips" in objective else None
    cache = setting.cache({"objective": objective.split()[0], "teacher_steps": 4}, clips)
    on_path = state_counts(cache.job)[0]
    for unit in cache.units:
        rows = load_file(cache.path(unit))
        assert ("v_neg" in rows) == (objective != "trajectory")
        assert not any(rows[name][:, :, :1].any() or not rows[name][:, :, 1:].any() for name in rows.keys() & {"v_pos", "v_neg"})
        assert all(torch.equal(x[:, :1], setting.bank.shown[unit.prompt].given) for x in rows["x"][:on_path]) and on_path == (0 if "clips" in objective else 4)
    batch = cache.batch(0)
    assert not batch.v_pos[:, :, :1].any() and batch.v_pos[:, :, 1:].any()


@pytest.mark.parametrize("side", ["high", "low"])
def test_an_expert_of_image_to_video_is_taught_what_it_says_of_each_prompts_own_picture(settings, side):
    setting, other = settings("2.2 I2V"), random_teacher(seed=9, depth=2, **FIELDS["2.2 I2V"])
    job = setting.job("cut", {"teacher_steps": 6}, role=Role(side=side, boundary=0.7), other=other.fingerprint)
    list(setting.events(job, side, other=other))
    until(setting.events(job, f"{side} halted", other=other), lambda event: isinstance(event, Step) and event.step == 2)
    list(setting.events(job, f"{side} halted", other=other))
    assert same(setting.state(side), setting.state(f"{side} halted"))
    bank, batch = setting.bank, TeacherCache(setting.folder / "cache", job, plan_units(job, setting.bank, None)).held_out()
    expected = guided_velocity(setting.teacher, batch.x, batch.sigma, bank.cond(batch.prompts), bank.negative_cond(batch.prompts), 3.0)
    assert (batch.guided(3.0) - expected).abs().max() < 0.01 * expected.abs().max() and len(batch.x) > 2


@pytest.mark.parametrize("kind", FIELDS)
def test_a_unit_is_another_when_its_picture_is(settings, kind):
    setting, other = settings(kind), pictures(kind, 1, settings(kind).shape, seed=3, tokens=TOKENS)
    for name in TOLD[kind]:
        shown = dataclasses.replace(setting.bank.shown[1], **{name: getattr(other[0], name)})
        changed = with_shown(setting.bank, [setting.bank.shown[0], shown, setting.bank.shown[2]])
        before, after = (plan_units(setting.job("cut"), bank, None) for bank in (setting.bank, changed))
        assert [mine.key != its.key for mine, its in zip(before, after)] == [unit.prompt == 1 for unit in before] and len(before) == 4, name


# ---- what is learnt, and what is not


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_loss_depends_on_what_a_student_says_where_frames_are_given(settings, objective):
    setting, seen = settings("TI2V"), []
    student, recipe, changes = OBJECTIVES[objective]
    running = setting.begun(setting.job(student, recipe, **changes), f"{objective} gradients")

    def keep(_, given, answered):
        velocity = answered[0] if isinstance(answered, tuple) else answered
        if velocity.requires_grad:
            velocity.retain_grad()
            seen.append(velocity)

    running.state.student.register_forward_hook(keep)
    for _ in running._gradients(0, 3):
        pass
    assert seen and all(velocity.grad is not None and not velocity.grad[:, :, :1].any() and velocity.grad[:, :, 1:].any() for velocity in seen)


def begun_matching(setting, name):
    running = setting.begun(setting.job("few", {"objective": "distribution", "rank": 4}), name)
    clips = result_of(running.learner._clips(torch.Generator().manual_seed(0)))
    return running.learner, clips, setting.bank.cond(clips.prompts)


def test_a_critic_that_knows_the_clips_has_nothing_to_learn(settings, monkeypatch):
    learner, clips, told = begun_matching(settings("TI2V"), "critic")
    x0 = clips.visited[-1]
    assert torch.equal(x0[:, :, :1], told.given)
    monkeypatch.setattr(matching, "student_velocity", lambda student, x, sigma, cond: cond.answer((x - x0) / sigma.view(-1, 1, 1, 1, 1)))
    assert learner._critic_loss(clips, torch.Generator().manual_seed(1)) < 1e-6


def test_clips_are_moved_by_how_far_they_are_from_the_teachers_where_they_are_made(settings):
    """Noise in the given frames, which nobody makes, would count as distance and make all steps shorter."""
    setting = settings("TI2V")
    learner, clips, told = begun_matching(setting, "moved")
    with torch.no_grad():
        gradient = learner._gradient(clips, told, torch.Generator().manual_seed(1))
        x, sigma, _ = learner._noised(clips.visited[-1], told, torch.Generator().manual_seed(1))
        v = guided_velocity(setting.teacher, x, sigma, told, setting.bank.negative_cond(clips.prompts), 3.0)
        real, fake = (flow.denoised(x, velocity, sigma) for velocity in (v, setting.teacher.velocity(x, sigma, told)))      # the critic has learnt nothing yet
        far = (told.made(clips.visited[-1]) - told.made(real)).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(told.made(gradient), told.made(fake - real) / far * 2, rtol=1e-3, atol=1e-5)     # half of the frames are made
    assert not gradient[:, :, :1].any() and torch.equal(x[:, :, :1], told.given)


def test_a_clip_is_judged_by_the_frames_that_are_made_and_shows_the_given_ones(settings):
    setting, recipe = settings("TI2V"), {"objective": "trajectory", "teacher_steps": 4}
    cache, job = setting.cache(recipe), setting.job("cut", recipe)
    paths, student = cache.held_out_paths(), WanLiteStudent.from_pretrained(setting.student("cut").folder)
    end = list(roll(student, torch.randn(len(paths.x), *setting.shape, generator=torch.Generator().manual_seed(2)), torch.tensor([1.0, 0.5, 0.0]), setting.bank,
                    paths.prompts, job))[-1]
    assert torch.equal(end[:, :, :1], setting.bank.cond(paths.prompts).given)
    held = result_of(evaluate(student, cache.held_out(), setting.bank, job, paths))
    end = list(roll(student, paths.x, student_sigmas(job), setting.bank, paths.prompts, job))[-1][:, :, 1:]
    goal = paths.goal[:, :, 1:]
    assert held.error == pytest.approx(float((end - goal).square().sum() / goal.square().sum()), rel=1e-4) and held.error > 0


# ---- what it takes


@pytest.mark.parametrize("kind", FIELDS)
def test_a_step_that_is_told_pictures_run_dry_takes_as_many_bytes_as_it_takes(kind):
    shape = shape_of(kind, size=16)
    bank = picture_bank(kind, 2, shape)

    def step():
        student = WanLiteStudent(hidden_size=256, depth=2, ffn_dim=512, **FIELDS[kind]).train()
        v = student_velocity(student, torch.randn(2, *shape), torch.rand(2), bank.cond([0, 1]))
        v.square().mean().backward()

    with LiveBytes() as real:
        step()
    with dry_run("cpu") as dry:
        step()
    assert dry.peak("cpu") == pytest.approx(real.peak("cpu"), rel=1e-3)


@pytest.mark.parametrize(("kind", "device"), [("2.1 I2V", "cpu"), ("FLF2V", "cuda")])
def test_the_memory_of_a_job_is_predicted_with_what_it_is_shown(kind, device):
    shape = shape_of(kind, size=8)
    bank, config = picture_bank(kind, 1, shape), WanLiteStudent(hidden_size=512, depth=4, ffn_dim=512, **FIELDS[kind]).wan
    job = DistillJob(student="s", teacher="t", prompts="p", shape=shape, shift=5.0, steps=10, recipe=Recipe(batch_size=1))
    unseen = with_shown(bank, [dataclasses.replace(bank.shown[0], clip_fea=None)])
    more, less = (predicted(job, config, Levers(), device, prompts).device for prompts in (bank, unseen))
    keys_and_values = 4 * 2 * len(bank.shown[0].clip_fea) * 512             # of four blocks; two bytes each at the least
    assert more - less > 2 * keys_and_values


# ---- a run, wherever it is


def test_a_run_is_told_what_its_wan_takes_whatever_its_bank_holds(settings):
    setting = settings("2.2 I2V")
    job = setting.job("cut")
    list(setting.events(job, "fitted"))
    more = with_shown(setting.bank, [dataclasses.replace(shown, given=torch.randn(16, 1, 4, 4), clip_fea=torch.randn(5, 1280)) for shown in setting.bank.shown])
    list(setting.events(job, "more", more))
    assert same(setting.state("fitted"), setting.state("more"))
    parts = Inputs(student=setting.student("cut"), prompts=more)
    list(inputs.prepare(RunFolder(setting.folder / "prepared"), job, parts, setting.teacher, setting.folder / "cache"))
    for name in ("more", "prepared"):
        assert PromptBank.load(setting.folder / name / "prompts.safetensors").fingerprint == setting.bank.fingerprint == job.prompts
    with pytest.raises(WanLiteError, match="The job was made for prompts"):
        list(setting.events(job, "others", with_shown(setting.bank, pictures("2.2 I2V", PROMPTS, setting.shape, seed=8))))
    with pytest.raises(WanLiteError, match="come with none"):
        list(setting.events(job, "none", with_shown(setting.bank, [])))


@pytest.mark.parametrize("kind", ["2.1 I2V", "TI2V"])
def test_a_prepared_folder_holds_the_pictures_and_the_command_goes_on_with_them(tmp_path, kind):
    setting = Setting(kind, tmp_path)
    setting.teacher.module.save_pretrained(tmp_path / "wan")
    setting.teacher = FileTeacher(tmp_path / "wan", shift=3.0, device=torch.device("cpu"))
    job = setting.job("cut")
    list(setting.events(job, "straight"))
    parts = Inputs(student=setting.student("cut"), prompts=setting.bank)
    list(inputs.prepare(RunFolder(tmp_path / "prepared"), job, parts, setting.teacher, tmp_path / "its cache"))
    until(setting.events(job, "halted"), lambda event: isinstance(event, Step) and event.step == 2)
    shutil.rmtree(tmp_path / "starts")
    found = inputs.read(RunFolder(tmp_path / "prepared")).prompts
    assert found.fingerprint == setting.bank.fingerprint
    for mine, its in zip(setting.bank.shown, found.shown):
        assert mine.tensors().keys() == its.tensors().keys() and all(torch.equal(value, its.tensors()[name]) for name, value in mine.tensors().items())
    assert cli.main(["cache", str(tmp_path / "prepared")]) == 0
    names = [{path.name for path in (tmp_path / cache).glob("*.safetensors")} for cache in ("cache", "its cache")]
    assert names[0] == names[1] and names[0]
    assert cli.main(["run", str(tmp_path / "prepared")]) == 0
    assert same(setting.state("straight"), setting.state("prepared"))
