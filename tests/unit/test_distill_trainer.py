"""A run: resumable bit for bit, better than its start on held-out states, and never silently another job's."""
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from helpers_compress import result_of
from helpers_disk import leave_room
from helpers_distill import SHAPE, Setting, same, until
from helpers_tiny import random_teacher
from safetensors.torch import load_file

from wanlite_model import flow
from wanlite_model.compress.build import create_student
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.checks import lora_fingerprint
from wanlite_model.distill.data import latents_fingerprint
from wanlite_model.distill.events import Eval, Finished, Planned, Sample, Saved, Stage, Step
from wanlite_model.distill.optim import Muon
from wanlite_model.distill.paths import seeded
from wanlite_model.distill.trainer import TIMED_STEPS, Run
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.lora import Factors, Lora
from wanlite_model.prompts import PromptBank
from wanlite_model.teacher import ModuleTeacher, guided_velocity
from wanlite_model.transformer import WanLiteStudent

@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("trainer"))


def averaged(state):
    return {name: value for name, value in state.items() if name.startswith("average.")}


def test_a_run_tells_its_story_and_ends_below_the_start_and_the_plain_cut(setting):
    events = list(setting.events(setting.job(steps=40, recipe={"learning_rate": 5e-4}), "story"))
    assert isinstance(events[0], Planned) and isinstance(events[1], Stage) and isinstance(events[-1], Finished)
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.step for step in steps] == list(range(1, 41)) and {step.total for step in steps} == {40}
    measured = [event for event in events if isinstance(event, Eval)]
    assert [event.step for event in measured] == [20, 40]
    end = events[-1]
    assert measured[-1].held.error < 0.6 * end.plain_cut
    assert end.losses == tuple(step.loss for step in steps)
    assert "plain cut" in end.report and "no effect" in end.report and "other noise of the same prompts" in end.report
    assert end.handle.card.cfg == 1 and end.handle.card.shift == setting.teacher.shift


def test_which_neurons_were_kept_survives_training_and_loading(tmp_path):
    setting = Setting(tmp_path)
    setting.student, _ = result_of(create_student(setting.teacher, setting.bank, SHAPE, depth=3, ffn_dim=192, method="interleaved", folder=tmp_path / "starts"))
    *_, end = setting.events(setting.job(steps=2))
    assert len(setting.student.plan.ffn_kept) == 3 and end.handle.plan == setting.student.plan
    assert StudentHandle.of(Path(end.handle.folder)).plan.ffn_kept == setting.student.plan.ffn_kept


def test_resume_continues_bit_for_bit(setting):
    list(setting.events(name="straight"))
    until(setting.events(name="halted"), lambda event: isinstance(event, Step) and event.step == 2)
    until(setting.events(name="halted"), lambda event: isinstance(event, Step) and event.step == 5)
    steps = [event.step for event in setting.events(name="halted") if isinstance(event, Step)]
    assert steps == [6]
    assert same(setting.state("straight"), setting.state("halted"))
    assert same(setting.weights("straight"), setting.weights("halted"))
    logged = [(setting.folder / name / "metrics.jsonl").read_text(encoding="utf-8").count('"kind": "step"') for name in ("straight", "halted")]
    assert logged == [6, 6]


def test_a_run_stopped_while_it_evaluates_keeps_its_step_and_not_the_average(setting):
    list(setting.events(name="straight"))
    until(setting.events(name="evaluating"), lambda event: isinstance(event, Stage) and event.name == "evaluating")
    list(setting.events(name="evaluating"))
    assert same(setting.state("straight"), setting.state("evaluating"))


@pytest.mark.parametrize("where", [Step, Stage], ids=["before its evaluation", "while it evaluates"])
def test_a_run_stopped_at_its_last_step_still_measures_it(setting, where):
    job = setting.job(steps=12, recipe={"evaluations": 1, "learning_rate": 5e-4})
    straight = list(setting.events(job, "whole"))[-1]
    name = f"stopped at {where.__name__}"
    until(setting.events(job, name), lambda event: isinstance(event, Step) and event.step == 12 if where is Step else
          isinstance(event, Stage) and event.name == "evaluating")
    resumed = list(setting.events(job, name))[-1]
    assert straight.handle.card.measured["best_step"] == 12
    assert resumed.handle.fingerprint == straight.handle.fingerprint and resumed.evaluations == straight.evaluations


@pytest.mark.parametrize("where", ["_fresh_state", "_gradients"])
@pytest.mark.parametrize("budget", [{"steps": 6}, {"steps": 0, "minutes": 0.2}], ids=["steps", "minutes"])
def test_a_card_that_is_too_small_for_every_rung_gets_a_sentence(setting, monkeypatch, where, budget):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(f"wanlite_model.distill.trainer.Run.{where}", full)
    with pytest.raises(WanLiteError, match="does not fit into this card"):
        list(setting.events(setting.job(**budget), f"small {where} {len(budget)}"))


def test_a_student_worse_than_its_baselines_is_reported_as_that(setting):
    wild = setting.job(steps=3, recipe={"learning_rate": 1e-7, "evaluations": 1})
    report = list(setting.events(wild, "worse"))[-1].report
    assert "Guidance folded in: not yet" in report and "%" not in report.split("Guidance")[1]


def test_sigmas_of_another_scheduler_are_named_in_the_report(setting):
    own, simple = (list(setting.events(setting.job(sigmas=sigmas), f"sigmas {i}"))[-1].report for i, sigmas in enumerate(
        [(1.0, 0.7, 0.1, 0.0), tuple(flow.schedule(3, setting.teacher.shift).tolist())]))
    assert "SIGMAS that were connected" in own and "Sample with euler, simple, 3 steps" in simple


def test_a_cache_that_was_interrupted_goes_on_and_gives_the_same_run(setting, tmp_path):
    own = Setting(tmp_path)
    until(own.events(), lambda event: isinstance(event, Stage) and event.name == "asking the teacher" and event.done == 2)
    list(own.events())
    list(setting.events(name="straight"))
    assert same(setting.state("straight"), own.state())


def test_a_finished_run_returns_from_disk_without_asking_the_teacher(setting):
    list(setting.events(name="straight"))
    teacher, setting.teacher = setting.teacher, random_teacher()
    setting.teacher.module = None               # any forward would fail
    try:
        events = list(setting.events(name="straight"))
    finally:
        setting.teacher = teacher
    assert len(events) == 1 and isinstance(events[0], Finished) and len(events[0].losses) == 6


def test_a_run_folder_of_another_job_is_refused_by_name_and_left_alone(setting):
    list(setting.events(name="straight"))
    before = {path: path.read_bytes() for path in (setting.folder / "straight").rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(WanLiteError, match=r"cfg=3.0, not 4.0.*new run name"):
        list(setting.events(setting.job(cfg=4.0), "straight"))
    assert before == {path: path.read_bytes() for path in before}


def test_after_a_resume_the_checkpoint_can_be_replaced_where_mapped_files_cannot(setting):
    until(setting.events(name="mapped"), lambda event: isinstance(event, Step) and event.step == 2)
    until(setting.events(name="mapped"), lambda event: isinstance(event, Step) and event.step == 3)
    with closing(setting.events(name="mapped")) as events:
        next(event for event in events if isinstance(event, Step))
        held = open("/proc/self/maps", encoding="utf-8").read() if os.path.exists("/proc/self/maps") else ""
        assert "mapped/checkpoint.safetensors" not in held


def test_a_changed_save_interval_does_not_start_a_new_run(setting):
    until(setting.events(name="interval"), lambda event: isinstance(event, Step) and event.step == 3)
    steps = [event.step for event in setting.events(setting.job(recipe={"save_every": 0.1}), "interval") if isinstance(event, Step)]
    assert steps == [4, 5, 6]


def test_save_every_writes_checkpoints_while_it_runs(setting, monkeypatch):
    clock = iter(range(0, 10_000_000, 20))      # each look at the clock is 20 seconds later
    monkeypatch.setattr("wanlite_model.distill.trainer.time.monotonic", lambda: float(next(clock)))
    often = [e for e in setting.events(setting.job(recipe={"save_every": 0.5}), "often") if isinstance(e, Saved)]
    rarely = [e for e in setting.events(setting.job(recipe={"save_every": 100}), "rarely") if isinstance(e, Saved)]
    assert len(often) > len(rarely) == 0 and often[0].bytes > 0


def test_a_run_in_use_is_refused(setting):
    with closing(setting.events(name="busy")) as first:
        next(first)
        with pytest.raises(WanLiteError, match="in use"):
            next(setting.events(name="busy"))


def test_finish_now_ends_early_with_the_best_so_far(setting):
    asked = []
    events = []
    for event in setting.events(setting.job(steps=500), "now", should_finish=lambda: bool(asked)):
        events.append(event)
        if isinstance(event, Step) and event.step == 3:
            asked.append(True)
    assert max(event.step for event in events if isinstance(event, Step)) == 3
    assert isinstance(events[-2], Stage) and isinstance(events[-1], Finished) and "500 planned" in events[-1].report


def test_minutes_that_end_in_a_checkpoint_leave_no_step_unmeasured(setting, monkeypatch):
    ended, exact = [], RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda self, state: exact(self, state) if state.step < 3 else ended.append(0) or exact(self, state))
    clock = iter(range(0, 10_000_000, 20))      # each look at the clock is 20 seconds later
    monkeypatch.setattr("wanlite_model.distill.trainer.time.monotonic", lambda: float(next(clock)))
    events = list(setting.events(setting.job(steps=500, recipe={"save_every": 0.1}), "ended while saving", should_finish=lambda: bool(ended)))
    assert [event.step for event in events if isinstance(event, (Step, Eval))] == [1, 2, 3, 3]


def test_after_a_crash_the_report_is_of_the_weights_that_are_handed_out(setting):
    """The best weights are written at once, the checkpoint every few minutes: a crash leaves a best that is newer."""
    job, older = setting.job(steps=8, recipe={"evaluations": 2}), None
    until(setting.events(job, "crash"), lambda event: isinstance(event, Step) and event.step == 2)
    older = (setting.folder / "crash" / "checkpoint.safetensors").read_bytes()
    until(setting.events(job, "crash"), lambda event: isinstance(event, Step) and event.step == 5)
    (setting.folder / "crash" / "checkpoint.safetensors").write_bytes(older)
    end = list(setting.events(job, "crash", should_finish=lambda: True))[-1]
    assert end.handle.card.measured["best_step"] in (0, 4)
    student = WanLiteStudent.from_pretrained(end.handle.folder, torch_dtype=torch.float32)
    from wanlite_model.distill.data import TeacherCache, plan_units
    from wanlite_model.distill.evaluate import evaluate
    held = TeacherCache(setting.folder / "cache", job, plan_units(job, setting.bank, None)).held_out()
    assert result_of(evaluate(student, held, setting.bank, job)).error == pytest.approx(end.handle.card.measured["held_out_error"])


def test_a_full_disk_while_saving_is_a_sentence_and_the_last_checkpoint_stays(setting, monkeypatch):
    until(setting.events(name="full"), lambda event: isinstance(event, Step) and event.step == 2)
    before = (setting.folder / "full" / "checkpoint.safetensors").read_bytes()

    leave_room(monkeypatch, len(before) // 2)
    with pytest.raises(WanLiteError, match="No space left.*intact"):
        until(setting.events(name="full"), lambda event: isinstance(event, Step) and event.step == 3)
    monkeypatch.undo()
    assert (setting.folder / "full" / "checkpoint.safetensors").read_bytes() == before
    assert not list((setting.folder / "full").glob(".*.tmp"))
    assert [event.step for event in setting.events(name="full") if isinstance(event, Step)] == [3, 4, 5, 6]


def test_the_best_is_kept_not_the_last(setting):
    wild = setting.job(steps=12, recipe={"learning_rate": 0.1, "evaluations": 6})
    end = list(setting.events(wild, "wild"))[-1]
    errors = dict(end.evaluations)
    best = min(errors, key=errors.get)
    kept = end.handle.card.measured
    assert kept["held_out_error"] <= 1.05 * errors[best] and kept["held_out_error"] < errors[12]      # rounded to bf16 since


def test_minutes_become_steps_once_and_a_resumed_run_obeys(setting):
    job = setting.job(steps=0, minutes=0.1)
    first = until(setting.events(job, "timed"), lambda event: isinstance(event, Step))
    again = until(setting.events(job, "timed"), lambda event: isinstance(event, Step))
    assert first.total == again.total >= 10 and again.step == 2


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Muon])
def test_the_speed_is_that_of_whole_steps_and_measuring_it_moves_nothing(setting, kind, monkeypatch):
    rates, exact = [], kind.step
    monkeypatch.setattr(kind, "step", lambda self, *given: rates.append(self.param_groups[0]["lr"]) or exact(self, *given))
    job = setting.job(steps=0, minutes=0.1, recipe={"optimizer": kind.__name__})
    running = Run(job, RunFolder(setting.folder / f"measured {kind.__name__}"), setting.folder / "cache", setting.teacher, setting.student, setting.bank,
                  None, lambda: False, False)
    with closing(running.events()) as working:
        next(event for event in working if isinstance(event, Stage) and event.name == "evaluating the start")
        before = {name: value.detach().clone() for name, value in running.state.trained.items()}
        rates.clear()               # of the step that was run dry
        next(event for event in working if isinstance(event, Stage) and event.name == "measuring the speed" and event.total != TIMED_STEPS)
        assert rates == [0.0] * TIMED_STEPS and not running.state.optimizer.state
        assert all(torch.equal(before[name], value) for name, value in running.state.trained.items())


@pytest.mark.parametrize("change", [
    {"recipe": {"learning_rate": 1e-3}}, {"recipe": {"batch_size": 2}}, {"recipe": {"warmup": 0}}, {"recipe": {"max_grad_norm": 0.01}},
    {"recipe": {"weight_decay": 0.5}}, {"recipe": {"ema_decay": 0.0}}, {"recipe": {"teacher_steps": 4}}, {"recipe": {"renoised": 0.0}},
    {"recipe": {"renoised": 1.0}}, {"recipe": {"full_range": 1.0}}, {"recipe": {"objective": "velocity + features"}}, {"recipe": {"optimizer": "Muon"}},
    {"cfg": 1.0}, {"cfg": 6.0},
    {"fold_guidance": False}, {"sigmas": (1.0, 0.5, 0.0)}, {"train_seed": 1}, {"steps": 5},
], ids=str)
def test_every_setting_that_decides_the_weights_changes_them(setting, change):
    name = "effect " + "".join(c if c.isalnum() else "_" for c in str(change))
    list(setting.events(name="straight"))
    list(setting.events(setting.job(**change), name))
    assert not same(averaged(setting.state("straight")), averaged(setting.state(name)))


def test_evaluations_says_how_often_the_held_out_error_is_measured(setting):
    events = setting.events(setting.job(recipe={"evaluations": 3}), "thrice")
    assert [event.step for event in events if isinstance(event, Eval)] == [2, 4, 6]


def test_guidance_kept_leaves_a_student_whose_negative_prompt_matters(setting):
    end = list(setting.events(setting.job(fold_guidance=False), "kept"))[-1]
    assert end.handle.card.cfg == 3.0 and "no effect" not in end.report


def test_user_latents_are_what_is_trained_on(setting):
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))
    from wanlite_model.distill.data import latents_fingerprint
    job = setting.job(latents=latents_fingerprint(latents))
    list(setting.events(name="straight"))
    list(setting.events(job, "latents", latents=latents))
    assert not same(setting.state("straight"), setting.state("latents"))
    with pytest.raises(WanLiteError, match="2 latents and 3 prompts"):
        list(setting.events(job, "two", latents=latents[:2]))
    assert not (setting.folder / "two").exists()


def test_with_eight_prompts_the_report_says_that_new_prompts_were_measured(tmp_path):
    end = list(Setting(tmp_path, prompts=8).events())[-1]
    assert "of 2 prompts that are kept out of training" in end.report


def test_the_report_says_how_many_steps_the_teachers_path_really_had(setting):
    for teacher_steps, real in ((5, 4), (4, 4)):
        recipe = {"objective": "trajectory", "student_steps": 2, "teacher_steps": teacher_steps}
        *_, end = setting.events(setting.job(steps=2, recipe=recipe), f"path-{teacher_steps}")
        assert ("followed in 4 steps instead of 5: 2 to each" in end.report) == (real != teacher_steps)


def test_a_job_that_is_too_short_for_its_prompts_says_so(tmp_path, caplog):
    setting = Setting(tmp_path, prompts=24)
    told = "Only {} of the 24 prompts are used: "
    short = list(setting.events(setting.job(steps=1), "short"))[-1].report
    assert told.format(16) + "so few steps need no more." in short
    RunFolder(tmp_path / "slow").path.mkdir()
    RunFolder(tmp_path / "slow").note("units", 5)                   # what a slow card would have measured
    timed = list(setting.events(setting.job(steps=0, minutes=0.1), "slow"))[-1].report
    assert told.format(5) + "the minutes allow no more. Give more minutes, or set a lower renoised" in timed and told.format(5) in caplog.text
    assert "prompts are used" not in list(setting.events(setting.job(steps=10), "long"))[-1].report


def test_a_teacher_asked_without_guidance_is_a_many_step_teacher_unless_told(setting):
    told = "asked without guidance, along 12 steps"
    assert told in list(setting.events(setting.job(cfg=1.0, steps=1, recipe={"teacher_steps": 12}), "many steps"))[-1].report
    assert "without guidance, along" not in list(setting.events(setting.job(cfg=1.0, steps=1), "its own steps"))[-1].report


def test_samples_are_drawn_at_evaluations_when_asked_for(setting):
    drawn = [event for event in setting.events(name="drawn", samples=True) if isinstance(event, Sample)]
    assert [sample.step for sample in drawn] == [3, 6] and drawn[0].latents.shape == (1, *SHAPE)
    assert not torch.equal(drawn[0].latents, drawn[1].latents)
    assert same(setting.state("drawn"), setting.state("straight"))


@pytest.mark.parametrize("recipe, steps", [({}, 3), ({"objective": "trajectory", "student_steps": 2, "teacher_steps": 4}, 4)], ids=["velocity", "trajectory"])
def test_a_sample_comes_with_what_the_teacher_made_of_the_same_noise(recipe, steps, setting):
    """By hand: the teacher's guided Euler steps from the noise of the held-out rollout, for its prompt."""
    name = f"beside {steps}"
    sample = until(setting.events(setting.job(recipe=recipe), name, samples=True), lambda event: isinstance(event, Sample))
    live = Run(setting.job(recipe=recipe), RunFolder(setting.folder / name), setting.folder / "cache", setting.teacher, setting.student, setting.bank, None,
               lambda: False, True)
    live.course = live.length.course()
    unit = live._planned_cache().held[0]
    x = torch.randn(1, *SHAPE, generator=seeded(0, "rollout", unit.index))
    start, _ = live._planned_cache().sample(unit, None)
    torch.testing.assert_close(start, x, atol=2e-3, rtol=2e-3)                  # kept in fp16
    sigmas = flow.schedule(steps, setting.teacher.shift)
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        v = guided_velocity(setting.teacher, x, sigma.expand(1), setting.bank.cond([unit.prompt]), setting.bank.negative_cond([unit.prompt]), 3.0)
        x = flow.euler_step(x, v, sigma, following)
    torch.testing.assert_close(sample.teacher, x, atol=1e-2, rtol=1e-2)
    assert (sample.latents - x).abs().max() > 0.1


def test_beside_a_sample_of_the_users_clips_there_is_none_of_the_teachers(setting):
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    job = setting.job(latents=latents_fingerprint(latents))
    sample = until(setting.events(job, "clips", latents=latents, samples=True), lambda event: isinstance(event, Sample))
    assert sample.teacher is None and sample.latents.shape == (1, *SHAPE)


@pytest.mark.parametrize("recipe", [{}, {"own_states": 1.0}, {"objective": "trajectory", "student_steps": 2, "own_states": 1.0}, {"rank": 4}], ids=str)
def test_no_more_than_a_forward_or_a_backward_lies_between_two_looks_at_cancel(setting, monkeypatch, recipe):
    calls, forward, backward = [], WanLiteStudent.forward, torch.Tensor.backward
    monkeypatch.setattr(WanLiteStudent, "forward", lambda self, *given, **named: calls.append("forward") or forward(self, *given, **named))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *given, **named: calls.append("backward") or backward(self, *given, **named))
    monkeypatch.setattr("wanlite_model.distill.learner.TOKENS_A_PASS", 8)
    most = 0
    for event in setting.events(setting.job(steps=0, minutes=0.05, recipe=recipe), f"looks {recipe}".replace(":", "")):
        most, calls[:] = most if isinstance(event, Planned) else max(most, len(calls)), []         # before it a step was run dry
    assert most == 1


def test_it_trains_inside_inference_mode_as_comfyui_runs_nodes(setting):
    list(setting.events(name="straight"))
    with torch.inference_mode():
        list(setting.events(name="inference"))
    assert same(setting.state("straight"), setting.state("inference"))


def test_a_yield_holds_no_gradient_mode(setting):
    with torch.no_grad():
        for event in setting.events(name="modes"):
            assert not torch.is_grad_enabled(), event


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(setting, monkeypatch):
    from wanlite_model.distill import objectives
    exact = objectives.velocity_loss
    monkeypatch.setattr(objectives, "velocity_loss", lambda v, target, scale: exact(v, target, scale) * (float("nan") if broken else 1))
    broken = []
    with pytest.raises(WanLiteError, match="not finite at step 4"):
        for event in setting.events(name="burst"):
            if isinstance(event, Step) and event.step == 3:
                broken.append(True)
    monkeypatch.undo()
    assert all(torch.isfinite(value).all() for value in setting.state("burst").values())
    assert [event.step for event in setting.events(name="burst") if isinstance(event, Step)] == [4, 5, 6]


@pytest.mark.parametrize(("change", "told"), [({"shape": (4, 2, 4, 4)}, "4 channels"), ({"shape": (16, 2, 5, 4)}, "multiples of 16"),
                                              ({"teacher": "another"}, "another")], ids=str)
def test_a_job_that_cannot_start_says_so_and_writes_nothing(setting, change, told):
    with pytest.raises(WanLiteError, match=told):
        list(setting.events(setting.job(**change), "never"))
    assert not (setting.folder / "never").exists()


def test_any_wan_of_the_same_latents_can_learn_from_a_teacher(setting, tmp_path):
    """Another width, more blocks: a genuine WAN of its own. Its start takes the place of the plain cut."""
    other = Setting(tmp_path)
    WanLiteStudent(hidden_size=256, depth=5, ffn_dim=128).save_pretrained(tmp_path / "wider")
    other.student = StudentHandle.of(tmp_path / "wider")
    *_, end = other.events(other.job(steps=30, recipe={"learning_rate": 1e-3}), "wider")
    assert end.handle.config.dim == 256 and "times below the untrained student" in end.report
    assert end.evaluations[-1][1] < 0.9 * end.plain_cut
    with pytest.raises(WanLiteError, match="what was cut from it"):
        list(other.events(other.job(recipe={"objective": "velocity + features"}), "never"))
    assert not (tmp_path / "never").exists()


def test_an_adapter_run_trains_adapters_alone_and_hands_out_a_lora(setting):
    job = setting.job(steps=30, recipe={"rank": 4, "learning_rate": 5e-3})
    end = list(setting.events(job, "lora"))[-1]
    assert all(".lora_" in name for name in setting.state("lora"))
    assert end.handle.folder == setting.student.folder and end.handle.loras == (str(setting.folder / "lora" / "lora-30.safetensors"),)
    with setting.student.open() as before, end.handle.open() as after:
        changed = {name for (name, old), (_, new) in zip(before.tensors(), after.tensors()) if not torch.equal(old, new)}
    assert changed and all(name.endswith(".weight") and "modulation" not in name and not name.startswith("text_embedding") for name in changed)
    assert {"time_projection.1.weight", "head.head.weight", "blocks.0.ffn.0.weight"} <= changed
    assert end.evaluations[-1][1] < end.plain_cut
    assert list(setting.events(job, "lora"))[-1].handle == end.handle                # from disk


def test_a_run_with_muon_goes_on_where_it_stopped_and_holds_one_moment_of_a_matrix(setting):
    job = setting.job(recipe={"optimizer": "Muon"})
    list(setting.events(job, "muon whole"))
    until(setting.events(job, "muon halves"), lambda event: isinstance(event, Step) and event.step == 3)
    list(setting.events(job, "muon halves"))
    whole = setting.state("muon whole")
    assert same(whole, setting.state("muon halves"))
    twice = {name.removeprefix("exp_avg_sq.") for name in whole if name.startswith("exp_avg_sq.")}
    once = {name.removeprefix("exp_avg.") for name in whole if name.startswith("exp_avg.")} - twice
    assert once == {name for name in once | twice if name.startswith("blocks.") and name.endswith(".weight") and ".norm" not in name}
    list(setting.events(setting.job(recipe={"optimizer": "Muon", "rank": 4}), "muon lora"))
    list(setting.events(setting.job(recipe={"rank": 4}), "adamw lora"))
    assert same(setting.state("muon lora"), setting.state("adamw lora"))             # adapters take AdamW, as the setting says


def test_a_step_that_broke_off_in_the_optimizer_is_not_saved(setting, monkeypatch):
    """Some of the weights have moved and some have not: what is on disk stays the last whole step."""
    job, exact, calls = setting.job(recipe={"optimizer": "Muon"}), Muon._orthogonal_step, []

    def fails(self, matrices, gradients):
        calls.append(0)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return exact(self, matrices, gradients)

    list(setting.events(job, "muon unbroken"))
    until(setting.events(job, "muon broken"), lambda event: isinstance(event, Step) and event.step == 3)
    monkeypatch.setattr(Muon, "_orthogonal_step", fails)
    events = list(setting.events(job, "muon broken"))
    assert [event.step for event in events if isinstance(event, Step)] == [4, 5, 6]
    plans = [event.told for event in events if isinstance(event, Planned)]
    assert "none needed" in plans[0] and "did not fit" in plans[1] and "blocks computed twice" in plans[1]
    assert same(setting.state("muon unbroken"), setting.state("muon broken"))


def test_an_adapter_run_goes_on_where_it_stopped(setting):
    job = setting.job(recipe={"rank": 4})
    list(setting.events(job, "lora whole"))
    until(setting.events(job, "lora halves"), lambda event: isinstance(event, Step) and event.step == 3)
    list(setting.events(job, "lora halves"))
    assert same(setting.state("lora whole"), setting.state("lora halves"))


def test_trajectory_steps_end_nearer_to_the_teachers_end(setting):
    recipe = {"objective": "trajectory", "student_steps": 2, "teacher_steps": 6, "learning_rate": 1e-3}
    events = list(setting.events(setting.job(steps=60, recipe=recipe), "trajectory"))
    measured = [event.held for event in events if isinstance(event, Eval)]
    assert measured[-1].error < 0.7 * events[-1].plain_cut
    assert events[-1].handle.card.steps == 2 and events[-1].handle.card.cfg == 1


def test_states_of_its_own_change_what_a_student_learns_and_resume_too(setting):
    jobs = {own: setting.job(recipe={"objective": "trajectory", "student_steps": 2, "own_states": own, "full_range": 0.0}) for own in (0.0, 1.0)}
    for own, job in jobs.items():
        list(setting.events(job, f"own {own}"))
    assert not same(averaged(setting.state("own 0.0")), averaged(setting.state("own 1.0")))
    until(setting.events(jobs[1.0], "own halves"), lambda event: isinstance(event, Step) and event.step == 3)
    list(setting.events(jobs[1.0], "own halves"))
    assert same(setting.state("own 1.0"), setting.state("own halves"))


def test_with_velocity_kd_the_teacher_is_asked_where_the_student_comes_to(setting):
    """The state is the student's own after so many of its steps, and its target is the teacher's guided answer at it."""
    job = setting.job(recipe={"own_states": 1.0})
    running = Run(job, RunFolder(setting.folder / "asked"), setting.folder / "cache", setting.teacher, setting.student, setting.bank, None,
                  lambda: False, False)
    with running.files.opened(job):
        next(event for event in running._work() if isinstance(event, Stage) and event.name == "evaluating the start")
    drawn = running.cache.batch(0)
    batch = result_of(running.learner.rolled(drawn))
    assert set(drawn.rolled.tolist()) <= {1, 2} and torch.equal(batch.sigma, flow.schedule(3, job.shift)[drawn.rolled])
    for row, steps in enumerate(drawn.rolled.tolist()):
        which = (drawn.prompts[row],)
        walk = flow.euler_steps(lambda x, s: running.state.student(x, 1000 * s, setting.bank.cond(which).context).detach(), drawn.x[row:row + 1],
                                flow.schedule(3, job.shift))
        x = [x for x, _, _ in walk][steps]
        torch.testing.assert_close(batch.x[row:row + 1], x, atol=1e-5, rtol=1e-4)
        wanted = guided_velocity(setting.teacher, x, batch.sigma[row:row + 1], setting.bank.cond(which), setting.bank.negative_cond(which), job.cfg)
        torch.testing.assert_close(batch[row:row + 1].guided(job.cfg), wanted, atol=1e-4, rtol=1e-3)
    list(setting.events(job, "own velocity"))
    list(setting.events(setting.job(), "no own velocity"))
    assert not same(averaged(setting.state("own velocity")), averaged(setting.state("no own velocity")))


@pytest.mark.parametrize("recipe", [{}, {"optimizer": "Muon"}], ids=str)
def test_a_learning_rate_a_thousand_times_too_high_never_becomes_the_best(setting, recipe):
    job = setting.job(steps=20, recipe={"learning_rate": 0.1, "max_grad_norm": 1000.0, "ema_decay": 0.0, **recipe})
    *_, end = setting.events(job, f"diverged {recipe}".replace(":", ""))
    found = [error for _, error in end.evaluations]
    assert all(not error < end.plain_cut for error in found) and "No evaluation was better than the start" in end.report
    with setting.student.open() as before, end.handle.open() as after:
        assert all(torch.equal(old.bfloat16(), new) for (_, old), (_, new) in zip(before.tensors(), after.tensors()))


@pytest.mark.parametrize("where", ["the teacher", "the student"])
def test_planted_nan_is_told_and_never_becomes_the_best(tmp_path, where, monkeypatch):
    setting = Setting(tmp_path)
    if where == "the teacher":
        with torch.no_grad():
            setting.teacher.module.blocks[1].ffn[0].bias[3] = float("nan")
        with pytest.raises(WanLiteError, match="not finite"):
            list(setting.events())
        assert not list((tmp_path / "cache").glob("*.safetensors")) and not (tmp_path / "run" / "best.safetensors").exists()
        return
    from wanlite_model.distill import trainer
    evaluated = trainer.Run._measure

    def poisoned(self):
        self.state.average.values["head.head.bias"][0] = float("nan")
        return evaluated(self)

    monkeypatch.setattr(trainer.Run, "_measure", poisoned)
    with pytest.raises(WanLiteError, match="not finite"):
        list(setting.events(setting.job(recipe={"ema_decay": 0.9})))
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "run" / "best.safetensors").values())
    assert RunFolder(tmp_path / "run").noted("finished") is None and not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_prompts_that_are_all_alike_still_make_a_run_that_is_judged_on_other_noise(tmp_path):
    setting = Setting(tmp_path)
    setting.bank = PromptBank(prompts=tuple(f"the same {i}" for i in range(9)), contexts=(setting.bank.contexts[0],) * 9, negative_text="",
                              negative=setting.bank.negative)
    *_, end = setting.events(setting.job(steps=20, recipe={"learning_rate": 5e-4}))
    assert end.evaluations[-1][1] < end.plain_cut and "other noise of the same prompts" in end.report


@pytest.mark.parametrize("rank, learning_rate", [(0, 2e-4), (4, 2e-3)])
def test_training_begins_with_the_lora_that_was_given(tmp_path, rank, learning_rate):
    """At step 0 the student is the base with the LoRA over it; afterwards it is nearer to the teacher, and a LoRA carries all of it."""
    setting = Setting(tmp_path, depth=6)
    setting.student, _ = result_of(create_student(setting.teacher, None, SHAPE, folder=tmp_path / "starts"))
    draw = torch.Generator().manual_seed(0)
    factors = {f"blocks.{i}.ffn.2": Factors(down=torch.randn(3, 256, generator=draw) * 0.3, up=torch.randn(128, 3, generator=draw) * 0.3, scale=0.5)
               for i in range(4)}
    lora = Lora(factors=factors, diffs={"blocks.1.norm3.bias": torch.full((128,), 0.2)})
    with setting.student.open() as opened:
        expected = WanLiteStudent.from_wan(setting.student.config)
        expected.load_state_dict(dict(lora.merged(opened.tensors())))
    job = setting.job(steps=30, start_from=lora_fingerprint(lora), recipe={"rank": rank, "learning_rate": learning_rate})
    with pytest.raises(WanLiteError, match="made for start_from"):
        list(setting.events(job, "without"))
    running = Run(job, RunFolder(tmp_path / "r"), tmp_path / "cache", setting.teacher, setting.student, setting.bank, None, lambda: False, False, lora)
    x, context = torch.randn(1, *SHAPE, generator=draw), torch.randn(1, 5, 4096, generator=draw)
    with torch.no_grad():
        begun = running._fresh_state().student(x, torch.tensor([500.0]), context)
        torch.testing.assert_close(begun, expected(x, torch.tensor([500.0]), context), atol=1e-5, rtol=1e-4)
    *_, end = setting.events(job, "healed", start_from=lora)
    assert end.evaluations[-1][1] < 0.9 * end.plain_cut and "times below the LoRA as it was" in end.report
    assert bool(end.handle.loras) == bool(rank)
    with end.handle.open() as opened:
        healed = dict(opened.tensors())
    if rank:
        assert torch.equal(opened.loras[0].diffs["blocks.1.norm3.bias"].float(), torch.full((128,), 0.2).bfloat16().float())
        assert {len(found.down) for found in opened.loras[0].factors.values()} == {rank}        # that of the given one was less
    assert end.handle.card.recipe["rank"] == rank
    assert not torch.equal(healed["blocks.1.norm3.bias"].float(), setting.teacher.module.blocks[1].norm3.bias)


def test_a_teacher_at_another_shift_is_the_same_teacher(tmp_path):
    setting = Setting(tmp_path, depth=6)
    setting.student, _ = result_of(create_student(setting.teacher, None, SHAPE, folder=tmp_path / "starts"))
    setting.teacher = ModuleTeacher(setting.teacher.module, shift=setting.teacher.shift + 2)
    with pytest.raises(WanLiteError, match="asked for what that does already"):
        list(setting.events(setting.job(cfg=1.0)))


def test_after_a_lora_the_next_run_is_still_compared_with_the_unguided_teacher(tmp_path):
    """The student of the first run is the start of the second; what both are compared with is the same."""
    setting = Setting(tmp_path, depth=6)
    setting.student, _ = result_of(create_student(setting.teacher, None, SHAPE, folder=tmp_path / "starts"))
    recipe = {"rank": 4, "learning_rate": 5e-3}
    *_, first = setting.events(setting.job(steps=30, recipe=recipe), "first")
    setting.student = first.handle
    *_, second = setting.events(setting.job(steps=30, recipe=recipe), "second")
    assert second.plain_cut == pytest.approx(first.plain_cut, rel=1e-4) and len(second.handle.loras) == 2
    assert "teacher without guidance" in second.report and second.evaluations[-1][1] < second.plain_cut
