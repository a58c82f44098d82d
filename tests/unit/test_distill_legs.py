"""A run can be asked for more or for less than it was begun for: it goes on, and nothing starts over."""
import pytest
import torch
from helpers_distill import Setting, same, until

from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.data import TeacherCache, plan_units
from wanlite_model.distill.events import Eval, Finished, Stage, Step
from wanlite_model.distill.job import Recipe
from wanlite_model.distill.legs import LEAST_STEPS, Course, Speed


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("legs"))


def steps(events):
    return [event.step for event in events if isinstance(event, Step)]


def test_the_learning_rate_of_a_leg_rises_and_falls_by_itself():
    recipe = Recipe(warmup=2, learning_rate=1e-3)
    course = Course.begin(20, 16, 4).extended(60, 100, 2)
    rates = [course.at(step).lr(step, recipe) for step in range(60)]
    assert rates[0] == rates[20] == 5e-4 and max(rates[:20]) == max(rates[20:]) == 1e-3 and rates[19] < 2e-4 > rates[59]
    assert [step for step in range(1, 61) if course.due(step)] == [5, 10, 15, 20, 40, 60]
    assert course.legs[1].units == 48 and Course.from_json(course.to_json()) == course
    assert course.extended(600, 100, 2).legs[2].units == 100                # no more than there are


def test_speed_turns_minutes_into_steps():
    assert Speed(seconds=2.0, before=60.0).steps(3.0) == 57 and Speed(seconds=2.0, before=600.0).steps(3.0) == LEAST_STEPS


def test_a_finished_run_asked_for_more_goes_on_and_hands_out_another_student(setting):
    *_, first = setting.events(setting.job(steps=6), "more")
    events = list(setting.events(setting.job(steps=12), "more"))
    assert steps(events) == [7, 8, 9, 10, 11, 12] and [e.step for e in events if isinstance(e, Eval)] == [9, 12]
    assert events[-1].handle.folder != first.handle.folder and first.handle.file.exists()          # a MODEL may have it open
    rates = [row["lr"] for row in RunFolder(setting.folder / "more").rows("step")]
    assert rates[6:] == rates[:6]                   # another rise and fall
    list(setting.events(setting.job(steps=6), "halted more"))
    until(setting.events(setting.job(steps=12), "halted more"), lambda event: isinstance(event, Step) and event.step == 9)
    assert steps(setting.events(setting.job(steps=12), "halted more")) == [10, 11, 12]
    assert same(setting.state("more"), setting.state("halted more"))


def test_a_longer_leg_asks_the_teacher_more_and_measures_on_what_was_held_out(setting):
    short, long = (plan_units(setting.job(steps=n), setting.bank, None) for n in (6, 400))
    more = plan_units(setting.job(steps=400), setting.bank, None, len(long), len(short))
    assert len(more) == len(long) > len(short) and more[:len(short)] == short
    assert [unit for unit in more if unit.held] == [unit for unit in short if unit.held]
    *_, first = setting.events(setting.job(steps=6), "longer")
    held = TeacherCache(setting.folder / "cache", setting.job(), short).held_out()
    events = list(setting.events(setting.job(steps=40), "longer"))
    legs = RunFolder(setting.folder / "longer").noted("legs")
    assert legs[1]["units"] >= legs[0]["units"] and events[-1].plain_cut == first.plain_cut
    assert torch.equal(held.x, TeacherCache(setting.folder / "cache", setting.job(), more).held_out().x)


def test_less_ends_an_unfinished_run_at_an_evaluation(setting):
    long, short = setting.job(steps=40, recipe={"evaluations": 10}), setting.job(steps=6)
    until(setting.events(long, "less"), lambda event: isinstance(event, Step) and event.step == 3)
    until(setting.events(long, "whole"), lambda event: isinstance(event, Step) and event.step == 8)
    events = list(setting.events(short, "less"))
    assert steps(events) == [4, 5, 6, 7, 8] and isinstance(events[-1], Finished)                  # evaluations are 4 apart
    assert same(setting.state("less"), setting.state("whole"))                                   # the same steps, not steps of another course
    assert len(list(setting.events(short, "less"))) == 1
    assert steps(setting.events(setting.job(steps=11), "less")) == [9, 10, 11, 12]               # the same course again, to its next evaluation


def test_less_than_a_finished_run_has_returns_it(setting):
    list(setting.events(setting.job(steps=6), "enough"))
    for job in (setting.job(steps=2), setting.job(steps=0, minutes=0.0)):
        assert len(list(setting.events(job, "enough"))) == 1


def test_finish_now_is_the_end_of_what_was_asked_for(setting):
    list(setting.events(setting.job(steps=20), "now", should_finish=lambda: (setting.folder / "now" / "metrics.jsonl").exists()))
    files = RunFolder(setting.folder / "now")
    assert files.noted("finished")["step"] < 20 and len(list(setting.events(setting.job(steps=20), "now"))) == 1
    assert steps(setting.events(setting.job(steps=21), "now"))[-1] == 21


def test_more_minutes_are_a_leg_of_as_many_steps_as_they_allow(setting, monkeypatch):
    job = setting.job(steps=0, minutes=0.1)
    until(setting.events(job, "minutes"), lambda event: isinstance(event, Step) and event.step == 2)
    files = RunFolder(setting.folder / "minutes")
    before = files.noted("legs")[0]["planned"]
    files.note("speed", {"seconds": 0.5, "before": 1.0})
    next(event for event in setting.events(setting.job(steps=0, minutes=10.0), "minutes") if isinstance(event, Stage) and event.name == "training")
    legs = files.noted("legs")
    assert legs[0]["planned"] == before and legs[1]["first"] + legs[1]["planned"] == Speed(seconds=0.5, before=1.0).steps(10.0)


def test_minutes_for_a_run_that_was_begun_by_steps_are_told_by_its_own_speed(setting):
    list(setting.events(setting.job(steps=6), "by steps"))
    files = RunFolder(setting.folder / "by steps")
    files.note("speed", {"seconds": 1.0, "before": 0.0})
    assert steps(setting.events(setting.job(steps=0, minutes=0.3), "by steps"))[-1] == Speed(seconds=1.0, before=0.0).steps(0.3) == 17
    fresh = Setting(setting.folder / "fresh")
    list(fresh.events(fresh.job(steps=6)))
    next(event for event in fresh.events(fresh.job(steps=0, minutes=60.0)) if isinstance(event, Stage) and event.name == "training")
    assert RunFolder(fresh.folder / "run").noted("speed")["seconds"] > 0 and len(RunFolder(fresh.folder / "run").noted("legs")) == 2


def test_a_run_that_has_gone_on_since_it_ended_keeps_the_leg_it_is_in(setting):
    list(setting.events(setting.job(steps=6), "since"))
    until(setting.events(setting.job(steps=12), "since"), lambda event: isinstance(event, Step) and event.step == 9)
    assert steps(setting.events(setting.job(steps=20), "since"))[0] == 10
    legs = RunFolder(setting.folder / "since").noted("legs")
    assert [(leg["first"], leg["planned"], leg["ended"]) for leg in legs] == [(0, 6, None), (6, 6, None), (12, 8, None)]


def test_a_damaged_unit_that_the_speed_is_measured_on_is_asked_for_again(tmp_path):
    setting = Setting(tmp_path)
    list(setting.events(name="straight"))
    for path in (tmp_path / "cache").glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    first = until(setting.events(setting.job(steps=0, minutes=0.05), "timed"), lambda event: isinstance(event, Step))
    assert first.step == 1


def test_a_unit_that_was_damaged_on_disk_is_asked_for_again_and_never_trained_on(tmp_path):
    setting = Setting(tmp_path)
    list(setting.events(name="straight"))
    until(setting.events(name="damaged"), lambda event: isinstance(event, Step) and event.step == 2)
    for path in (tmp_path / "cache").glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-20] ^= 255                         # one value of the last state
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    events = list(setting.events(name="damaged"))
    assert steps(events) == [3, 4, 5, 6] and any(isinstance(event, Stage) and event.name == "asking the teacher" for event in events)
    assert same(setting.state("straight"), setting.state("damaged"))
