"""Distribution matching: one copy of the weights for three, a critic that learns, and a student that is moved to where the teacher is."""
import dataclasses
from pathlib import Path

import pytest
import torch
from helpers_compress import result_of
from helpers_tiny import random_bank, random_teacher
from safetensors.torch import load_file

from wanlite_model.compress.build import create_student
from wanlite_model.distill.adapters import Adapters, BaseTeacher, fresh_factors
from wanlite_model.distill.begin import fresh_state, online_teacher
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.evaluate import drift
from wanlite_model.distill.events import Stage, Step
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.trainer import Run, run
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.lora import read_lora

SHAPE = (16, 2, 4, 4)
FEW = Recipe(objective="trajectory", rank=4, student_steps=2, teacher_steps=4, learning_rate=2e-3, batch_size=4, warmup=2, evaluations=1)
MATCH = dataclasses.replace(FEW, objective="distribution", learning_rate=1e-3, evaluations=2, ema_decay=0.5)


class Setting:
    """A tiny teacher and a few-step student of its own size."""

    def __init__(self, folder):
        self.folder, self.teacher, self.bank = folder, random_teacher(depth=2), random_bank(3)
        self.start, _ = result_of(create_student(self.teacher, None, SHAPE, folder=folder / "starts"))
        self.few = self.run(self.start, FEW, "few", steps=20)[-1].handle

    def job(self, student, recipe, **changes):
        return DistillJob(**{"student": student.fingerprint, "teacher": self.teacher.fingerprint, "prompts": self.bank.fingerprint, "shape": SHAPE,
                             "shift": self.teacher.shift, "cfg": 3.0, "steps": 6, "recipe": recipe, **changes})

    def events(self, student, recipe, name, **changes):
        return run(self.job(student, recipe, **changes), self.folder / name, self.folder / "cache", self.teacher, student, self.bank)

    def run(self, student, recipe, name, **changes):
        return list(self.events(student, recipe, name, **changes))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("matching"))


def begun(setting, student, recipe=MATCH):
    """The state before the first step, and who is asked."""
    job = setting.job(student, recipe)
    state = fresh_state(job, student, setting.teacher, None)
    return state, online_teacher(job, student, setting.teacher, state)


def test_the_base_under_its_adapters_is_the_teacher_and_no_second_copy_is_asked(setting):
    state, online = begun(setting, setting.few)
    assert isinstance(online, BaseTeacher) and online.module is state.student
    x, sigma, cond = torch.randn(2, *SHAPE), torch.tensor([0.9, 0.3]), setting.bank.cond((0, 1))
    torch.testing.assert_close(online.velocity(x, sigma, cond), setting.teacher.velocity(x, sigma, cond), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        student = state.student(x, 1000 * sigma, cond.context)
    with setting.few.open() as source:
        few = setting.few.load(torch.float32)
        assert len(source.loras) == 1
    with torch.no_grad():
        torch.testing.assert_close(student, few(x, 1000 * sigma, cond.context), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(student, setting.teacher.velocity(x, sigma, cond), atol=1e-4)


def test_another_student_is_taught_by_the_teacher_that_was_given(setting):
    cut, _ = result_of(create_student(setting.teacher, None, SHAPE, depth=1, method="interleaved", folder=setting.folder / "starts"))
    assert begun(setting, cut, dataclasses.replace(FEW, objective="velocity"))[1] is setting.teacher


def test_a_run_ends_with_one_lora_in_place_of_the_one_it_went_on_from(setting):
    *events, end = setting.run(setting.few, MATCH, "matched", steps=12)
    assert len(end.handle.loras) == 1 and end.handle.loras[0].endswith(".safetensors") and end.handle.loras != setting.few.loras
    assert "brightness, contrast, sharpness and motion" in end.report and "LoRA as it was" in end.report
    before, after = (read_lora(Path(path), setting.start.config) for path in (setting.few.loras[0], end.handle.loras[0]))
    assert before.factors.keys() == after.factors.keys()
    assert not any("critic" in name for name in after.tensors())
    state = load_file(setting.folder / "matched" / "checkpoint.safetensors")
    moved = [name for name in state if name.startswith("student.critic.") and name.endswith("lora_B.weight") and state[name].abs().max() > 0]
    assert moved and end.evaluations[-1][0] == 12


def test_it_goes_on_where_it_stopped(setting):
    setting.run(setting.few, MATCH, "whole")
    events = setting.events(setting.few, MATCH, "halves")
    for event in events:
        if isinstance(event, Step) and event.step == 3:
            break
    events.close()
    setting.run(setting.few, MATCH, "halves")
    whole, halves = (load_file(setting.folder / name / "checkpoint.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_students_gradient_vanishes_when_the_critic_says_what_the_teacher_says(setting):
    """With cfg 1 and a critic that has learnt nothing yet, both are the base: there is nowhere to go."""
    running = Run(setting.job(setting.few, MATCH, cfg=1.0), RunFolder(setting.folder / "still"), setting.folder / "cache", setting.teacher,
                  setting.few, setting.bank, None, lambda: False, False)
    running.began = 0.0
    setting.folder.joinpath("still").mkdir()
    next(event for event in running._work() if isinstance(event, Stage) and event.name == "evaluating the start")
    matching = running.learner
    draw = torch.Generator().manual_seed(0)
    clips = result_of(matching._clips(draw))
    with torch.no_grad():
        gradient = matching._gradient(clips, setting.bank.cond(clips.prompts), draw)
        assert gradient.abs().max() < 1e-4
        critic = running.state.critic
        critic.parameters["head.head.lora_B.weight"].add_(0.1)
        assert matching._gradient(clips, setting.bank.cond(clips.prompts), draw).abs().max() > 1e-3


def test_a_step_of_the_student_goes_to_where_the_teacher_is_and_away_from_the_critic(setting):
    """The critic is told to see clips that are shifted by a constant: the gradient has its sign, and a step takes the clip the other way."""
    running = Run(setting.job(setting.few, MATCH, cfg=1.0), RunFolder(setting.folder / "signs"), setting.folder / "cache", setting.teacher,
                  setting.few, setting.bank, None, lambda: False, False)
    setting.folder.joinpath("signs").mkdir()
    next(event for event in running._work() if isinstance(event, Stage) and event.name == "evaluating the start")
    matching, state, draw = running.learner, running.state, torch.Generator().manual_seed(0)
    clips = result_of(matching._clips(draw))
    cond = setting.bank.cond(clips.prompts)
    for name, value in state.critic.parameters.items():
        value.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    with torch.no_grad():
        x, sigma, _ = matching._noised(clips.visited[-1], cond, torch.Generator().manual_seed(5))
        with state.adapters.switched(False), state.critic.switched(True):
            fake = x - sigma.view(-1, 1, 1, 1, 1) * state.student(x, 1000 * sigma, cond.context)
        real = x - sigma.view(-1, 1, 1, 1, 1) * setting.teacher.velocity(x, sigma, cond)
        gradient = matching._gradient(clips, cond, torch.Generator().manual_seed(5))
        scale = (clips.visited[-1] - real).abs().mean((1, 2, 3, 4), keepdim=True)
        torch.testing.assert_close(gradient, (fake - real) / scale, atol=1e-4, rtol=1e-3)
    turn, sigmas = 0, torch.tensor([1.0, 0.6])
    loss = matching._student_loss(clips, sigmas[0], turn, torch.Generator().manual_seed(5))
    loss.backward()
    with torch.no_grad():
        before = state.student(clips.visited[0], 1000 * sigmas[:1].expand(len(cond)), cond.context)
        for value in state.adapters.parameters.values():
            value.data.add_(value.grad, alpha=-1e-3)
        after = state.student(clips.visited[0], 1000 * sigmas[:1].expand(len(cond)), cond.context)
    moved = (sigmas[1] - sigmas[0]) * (after - before)              # of the clip, by this step
    assert float((moved * gradient).sum()) < 0
    assert all(value.grad is None for value in state.critic.parameters.values())


def test_a_step_that_broke_off_is_not_saved(setting, monkeypatch):
    from wanlite_model.distill.matching import Matching
    inner = Matching.gradients

    def breaks(self, step, total):
        losses = 0
        for loss in inner(self, step, total):
            losses += loss is not None
            yield None if loss is None else loss * (float("nan") if step == 2 and losses == 3 else 1)

    monkeypatch.setattr(Matching, "gradients", breaks)
    with pytest.raises(WanLiteError, match="not finite at step 3"):
        setting.run(setting.few, MATCH, "broken")
    assert not (setting.folder / "broken" / "checkpoint.safetensors").exists()
    monkeypatch.setattr(Matching, "gradients", inner)
    setting.run(setting.few, MATCH, "broken")
    setting.run(setting.few, MATCH, "never broken")
    one, other = (load_file(setting.folder / name / "checkpoint.safetensors") for name in ("broken", "never broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_it_cannot_go_on_from_is_said_in_words(setting):
    with pytest.raises(WanLiteError, match="one few-step LoRA"):
        setting.run(setting.start, MATCH, "bare")
    with pytest.raises(WanLiteError, match="made for 2 steps, and this job is for 3"):
        setting.run(setting.few, dataclasses.replace(MATCH, student_steps=3), "other steps")
    with pytest.raises(WanLiteError, match="rank is 0"):
        setting.job(setting.few, dataclasses.replace(MATCH, rank=0))


def test_drift_sees_brightness_contrast_blur_and_stillness_and_nothing_else():
    clips = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert drift(clips, clips) == 0 and drift(clips.roll(2, dims=-1).flip(-2), clips) < 2e-2
    blurred = torch.nn.functional.avg_pool3d(clips, (1, 3, 3), stride=1, padding=(0, 1, 1))
    still = clips[:, :, :1].expand_as(clips) + 0.01 * clips
    for changed in (clips + 1, 2 * clips, blurred, still):
        assert drift(changed, clips) > 0.1
    assert drift(clips[:, :, :1], clips[:, :, :1]) == 0


def test_adapters_that_are_off_change_nothing_and_two_of_them_are_told_apart():
    teacher = random_teacher(depth=1)
    module, draw = teacher.module, torch.Generator().manual_seed(0)
    x, t, context = torch.randn(1, *SHAPE), torch.tensor([500.0]), torch.randn(1, 4, 4096)
    with torch.no_grad():
        base = module(x, t, context)
        first, second = (Adapters(module, fresh_factors(module, 2, draw), enabled=enabled) for enabled in (True, False))
        for adapters, value in ((first, 0.1), (second, -0.1)):
            adapters.parameters["head.head.lora_B.weight"].fill_(value)
        one = module(x, t, context)
        with first.switched(False):
            assert torch.equal(module(x, t, context), base)
            with second.switched(True):
                other = module(x, t, context)
        assert torch.equal(module(x, t, context), one)
    assert not torch.allclose(one, base) and not torch.allclose(other, base) and not torch.allclose(one, other)

