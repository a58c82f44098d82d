"""A limit on disk removes what was used longest ago, never what is in use, and says so."""
import os

import pytest
from filelock import FileLock
from helpers_distill import Setting, same, until

from wanlite_model.distill.events import Step
from wanlite_model.distill.levers import LeverSettings
from wanlite_model.distill.room import clear_cache, clear_runs, in_use
from wanlite_model.errors import WanLiteError


def answers(folder, ages):
    """Files of 1000 bytes; the larger the number, the longer ago."""
    folder.mkdir(exist_ok=True)
    for name, age in ages.items():
        path = folder / f"{name}.safetensors"
        path.write_bytes(b"0" * 1000)
        os.utime(path, (1e9 - age, 1e9 - age))


def names(folder):
    return {path.stem for path in folder.glob("*.safetensors")}


def test_answers_used_longest_ago_go_first_and_this_jobs_stay(tmp_path, caplog):
    answers(tmp_path, {"mine": 900, "old": 800, "older": 850, "new": 1})
    assert clear_cache(tmp_path, 3500, [tmp_path / "mine.safetensors"], to_come=1000) == 2000
    assert names(tmp_path) == {"mine", "new"} and "removed" in caplog.text
    assert clear_cache(tmp_path, 3500, [tmp_path / "mine.safetensors"], to_come=1000) == 0


def test_nothing_is_removed_while_another_job_uses_the_cache(tmp_path, caplog):
    answers(tmp_path, {"old": 800})
    with in_use(tmp_path), in_use(tmp_path):
        assert clear_cache(tmp_path, 10, [], 0) == 0 and names(tmp_path) == {"old"} and "another job" in caplog.text
    with in_use(tmp_path):
        assert clear_cache(tmp_path, 10, [], 0) == 1000


def test_runs_worked_on_longest_ago_go_first_and_none_in_use(tmp_path):
    for age, name in enumerate(("newest", "busy", "old", "chained")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.safetensors").write_bytes(b"0" * 1000)
        (tmp_path / name / "job.json").write_text("{}", encoding="utf-8")
        os.utime(tmp_path / name / "job.json", (1e9 - age, 1e9 - age))
    (tmp_path / "something else").mkdir()
    with FileLock(tmp_path / "busy" / ".lock"):
        clear_runs(tmp_path, 1500, [tmp_path / "this one", tmp_path / "chained" / "student-6"], to_come=0)
    assert {path.name for path in tmp_path.iterdir()} == {"busy", "chained", "something else"}


def test_a_jobs_limit_clears_answers_of_others_before_it_asks(tmp_path):
    setting = Setting(tmp_path)
    list(setting.events(name="first"))
    before = names(tmp_path / "cache")
    other = setting.job(train_seed=5, levers=LeverSettings(cache_gib=1e-6))
    list(setting.events(other, "second"))
    assert not names(tmp_path / "cache") & before
    list(setting.events(name="first"))                  # it has ended: nothing is asked again
    until(setting.events(name="again"), lambda event: isinstance(event, Step))
    assert names(tmp_path / "cache") >= before
    list(setting.events(name="again"))
    assert same(setting.state("first"), setting.state("again"))


def test_a_drive_without_room_is_a_sentence_before_the_first_answer(tmp_path):
    setting = Setting(tmp_path)
    with pytest.raises(WanLiteError, match="This run takes .* on disk, and .* are free on the drive"):
        list(setting.events(setting.job(levers=LeverSettings(disk_gib=1e-3)), "small"))
    assert not names(tmp_path / "cache")
