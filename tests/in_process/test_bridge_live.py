"""What the page is shown of a run: the same from its events as from its folder."""
import json

import pytest
from helpers_distill import Setting


@pytest.fixture(scope="module")
def live(pack):
    return pack("nodes.comfy_bridge.live")


def files_of(pack, folder):
    return pack("wanlite_model.distill.checkpoint").RunFolder(folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    setting = Setting(tmp_path_factory.mktemp("live"))
    return setting, list(setting.events())


def translated(pack, event):
    """The same event as the pack's own engine makes it: a test's engine is another copy."""
    kind = getattr(pack("wanlite_model.distill.events"), type(event).__name__)
    return kind(**{name: getattr(event, name) for name in kind.__dataclass_fields__})


def without_moment(shown):
    return {name: value for name, value in shown.items() if name not in ("node", "stage", "done", "of", "told", "left")}


def test_a_run_from_its_events_is_the_run_from_its_folder(live, pack, ran):
    setting, events = ran
    files = pack("wanlite_model.distill.checkpoint").RunFolder(setting.folder / "run")
    told = live.Live(files, "7", pack("wanlite_model.distill.job").DistillJob.from_json(setting.job().to_json()))
    told._curve, told._errors, told._step = live.Curve(), {}, 0                 # as it was before the first step
    moments = []
    for event in events:
        told.take(translated(pack, event))
        moments.append(told.shown({"used": 5, "total": 9, "process": 3}))
    assert [moment["step"] for moment in moments] == sorted(moment["step"] for moment in moments)
    assert all(moment["running"] and moment["node"] == "7" for moment in moments[:-1]) and moments[-1]["report"]
    told.leave()
    again = live.Live(files)
    assert without_moment(told.shown()) == without_moment(again.shown())
    shown = again.shown()
    json.dumps(shown, allow_nan=False)
    assert (shown["step"], shown["steps"], shown["begun"], shown["running"]) == (6, 6, True, False)
    finished = events[-1]
    assert [loss for _, loss in shown["curve"]] == pytest.approx(finished.losses, rel=1e-3)
    assert [tuple(error) for error in shown["errors"]] == [(step, pytest.approx(error, rel=1e-3)) for step, error in finished.evaluations]
    assert shown["plain_cut"] == pytest.approx(finished.plain_cut, rel=1e-3) and shown["report"] == finished.report


def test_what_a_run_goes_on_from_takes_the_place_of_what_was_logged_beyond(live, pack, ran):
    setting, events = ran
    told = live.Live(pack("wanlite_model.distill.checkpoint").RunFolder(setting.folder / "run"), "7",
                     pack("wanlite_model.distill.job").DistillJob.from_json(setting.job().to_json()))
    assert told.shown()["step"] == 6
    step = next(event for event in events if getattr(event, "step", 0) == 3 and hasattr(event, "loss"))
    told.take(translated(pack, step))
    assert [at for at, _ in told.shown()["curve"]] == [1, 2, 3] and told.shown()["report"] == "" and told.shown()["errors"] == []


def test_the_most_memory_that_was_seen_stays(live, pack, tmp_path):
    told = live.Live(pack("wanlite_model.distill.checkpoint").RunFolder(tmp_path / "none"))
    assert told.shown()["memory"] is None and not told.shown()["begun"]
    assert [told.shown({"used": used, "total": 9, "process": 3})["memory"]["peak"] for used in (5, 8, 6)] == [5, 8, 8]


def test_a_long_curve_keeps_its_shape_in_few_points(live):
    curve = live.Curve()
    for step in range(1, 1001):
        curve.add(step, step / 1000)
    points = curve.points
    assert live.POINTS / 2 < len(points) <= live.POINTS
    assert all(loss == pytest.approx(step / 1000, abs=1e-3) for step, loss in points)
    assert points[0][0] < 10 and points[-1][0] > 990 and [step for step, _ in points] == sorted(step for step, _ in points)


DAMAGE = {
    "job.json of another version": ("job.json", '{"job": {"student": 1}, "baseline": [], "finished": {"step": 6}, "last": "many"}'),
    "job.json torn": ("job.json", '{"job": '),
    "a log of something else": ("metrics.jsonl", '{"kind": "step", "step": "six", "loss": 1}\n{"kind": "step"}\n{"kind": "eval", "step": 2, "error": "none"}\n[1]\nno'),
    "a log that is a folder": ("metrics.jsonl", None)}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_cannot_be_read_is_not_shown_and_hinders_nothing(what, live, pack, tmp_path):
    """Whether a job can run with such a folder is for the engine to say, in a sentence."""
    name, text = DAMAGE[what]
    (tmp_path / name).mkdir() if text is None else (tmp_path / name).write_text(text, encoding="utf-8")
    shown = live.Live(files_of(pack, tmp_path)).shown()
    json.dumps(shown, allow_nan=False)
    assert (shown["step"], shown["curve"], shown["errors"], shown["plain_cut"], shown["report"]) == (0, [], [], None, "")


def test_a_curve_that_grows_can_be_read_in_another_thread(live):
    import threading
    curve, failed = live.Curve(), []

    def read():
        try:
            while not done.is_set():
                assert all(loss == 1 for _, loss in curve.points)
        except Exception as error:
            failed.append(error)

    done, reader = threading.Event(), threading.Thread(target=read)
    reader.start()
    for step in range(20_000):
        curve.add(step, 1.0)
    done.set()
    reader.join()
    assert not failed
