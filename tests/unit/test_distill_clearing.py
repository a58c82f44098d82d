"""Clearing what jobs left: all that WanLite made and no job works on, nothing else, and nothing by halves."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_distill import Setting

from wanlite_model.compress.handle import StudentHandle
from wanlite_model.distill import room
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.clearing import Places, clear, lost, used
from wanlite_model.distill.finish import finished_from_disk
from wanlite_model.errors import WanLiteError
from wanlite_model.files import read_json, write_json
from wanlite_model.formats.lora import read_lora
from wanlite_model.formats.write import save_lora, write_student

ROOT = Path(__file__).resolve().parents[2]
WORKING = """
import sys, time
from pathlib import Path
from filelock import FileLock
from wanlite_model.distill.room import in_use
with FileLock(Path(sys.argv[1]) / ".lock"), in_use(Path(sys.argv[2])):
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a finished run, one that was stopped and one over the first's student leave behind; to be copied."""
    setting = Setting(tmp_path_factory.mktemp("made"), prompts=2)
    list(setting.events(setting.job(steps=2), "runs/ended"))
    halted = setting.events(setting.job(steps=2, train_seed=1), "runs/stopped")
    while not (setting.folder / "runs/stopped/best.safetensors").is_file():
        next(halted)
    halted.close()
    return setting


@pytest.fixture
def places(made, tmp_path):
    for name in ("runs", "cache", "starts"):
        shutil.copytree(made.folder / name, tmp_path / name)
    for run in (tmp_path / "runs").iterdir():           # the handles name the folder that they were made in
        text = (run / "job.json").read_text(encoding="utf-8")
        (run / "job.json").write_text(text.replace(json.dumps(str(made.folder))[1:-1], json.dumps(str(tmp_path))[1:-1]), encoding="utf-8")
    return Places(runs=tmp_path / "runs", cache=tmp_path / "cache", starts=tmp_path / "starts")


def files(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def start_of(places):
    return next(path for path in places.starts.iterdir() if path.is_dir())


def names(cleared):
    return {one.name for one in cleared.kept}


def test_all_that_jobs_left_is_counted_and_goes(places):
    shutil.copy(next(places.cache.glob("*.safetensors")), places.cache / "compare.tmp")
    (places.cache / "compare").mkdir()
    (places.cache / "compare.tmp").rename(places.cache / "compare" / f"{'0' * 24}.safetensors")
    count = len(files(places.cache))
    before = {name: sum(files(getattr(places, name)).values()) for name in ("runs", "cache", "starts")}
    found = used(places)
    assert {name: one.bytes for name, one in found.items()} == before and min(before.values()) > 0
    assert [found[name].count for name in ("runs", "cache", "starts")] == [2, count, 1]
    cleared = clear(places)
    assert cleared.kept == () and cleared.freed == sum(before.values())
    assert [files(place) for place in (places.runs, places.cache, places.starts)] == [{}, {}, {}]
    assert all(one.bytes == one.count == 0 for one in used(places).values()) and clear(places).freed == 0


def test_places_that_are_not_there_are_empty_and_none_is_made(tmp_path):
    absent = Places(runs=tmp_path / "runs", cache=tmp_path / "cache", starts=tmp_path / "starts")
    assert clear(absent).freed == 0 and used(absent)["runs"].count == 0 and lost(absent.runs, []) == {"unsaved": [], "unfinished": []}
    assert not list(tmp_path.iterdir())


def test_a_file_with_two_names_counts_once_and_one_that_stays_elsewhere_not_at_all(places, tmp_path):
    """A prepared run holds its start by a second name, and a loaded student may be such a start."""
    before = sum(one.bytes for one in used(places).values())
    start, model = start_of(places) / "diffusion_model.safetensors", tmp_path / "model.safetensors"
    (places.runs / "ended/start/it").mkdir(parents=True)
    os.link(start, places.runs / "ended/start/it/diffusion_model.safetensors")
    assert sum(one.bytes for one in used(places).values()) == before
    os.link(start, model)
    size = model.stat().st_size
    assert sum(one.bytes for one in used(places).values()) == before - size
    assert clear(places).freed == before - size and model.stat().st_size == size


def test_what_wanlite_did_not_make_stays_and_a_run_around_it_too(places, tmp_path):
    away = tmp_path / "away"
    shutil.copytree(places.runs / "ended", away / "run")
    shutil.copytree(places.cache, away / "compare")
    shutil.copytree(start_of(places), away / "start")
    answer = next((away / "compare").glob("*.safetensors"))
    links = {places.runs / "linked": away / "run", places.cache / "compare": away / "compare", places.starts / ("f" * 16): away / "start",
             places.cache / f"{'e' * 24}.safetensors": answer, places.runs / "stopped/teacher": away / "run"}
    for link, goal in links.items():
        link.symlink_to(goal, target_is_directory=goal.is_dir())
    theirs = {places.runs / "notes.txt", places.runs / "mine/job.json", places.runs / "ended/student-2/notes.txt", places.cache / "mine.safetensors",
              places.starts / "mine/start.json"}
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}", encoding="utf-8")
    before = files(away)
    cleared = clear(places)
    assert files(away) == before and all(path.is_file() for path in theirs) and all(link.is_symlink() for link in links)
    assert files(places.runs / "mine") == {"job.json": 2}
    assert {one.name: one.why.split(" lies")[0] for one in cleared.kept if one.name in ("ended", "stopped")} == {
        "ended": "student-2/notes.txt", "stopped": "teacher"}
    assert names(cleared) == {"ended", "stopped", "mine", f"start {start_of(places).name}"}        # the start is one that they were made from
    assert {path.name for path in places.cache.glob("*.safetensors")} == {"mine.safetensors", f"{'e' * 24}.safetensors"}


def test_a_run_that_another_process_works_on_stays_with_all_that_it_needs(places):
    with subprocess.Popen([sys.executable, "-c", WORKING, str(places.runs / "ended"), str(places.cache)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "begun\n"
        before = {name: files(getattr(places, name)) for name in ("runs", "cache", "starts")}
        cleared = clear(places)
        job.kill()
    assert names(cleared) == {"ended", "answers", f"start {start_of(places).name}"} and all(one.why.endswith(".") for one in cleared.kept)
    assert cleared.freed == sum(size for name, size in before["runs"].items() if name.startswith("stopped/"))
    assert {name for name in files(places.runs)} == {name for name in before["runs"] if name.startswith("ended/")}
    assert {name: size for name, size in files(places.cache).items() if "lock" not in name} == {
        name: size for name, size in before["cache"].items() if "lock" not in name}
    assert names(clear(places)) == set()            # it was killed: nothing is in use any more


def test_a_run_whose_student_a_busy_one_goes_on_from_stays(places):
    notes = read_json(places.runs / "stopped/job.json")
    write_json(places.runs / "stopped/job.json", {**notes, "student": read_json(places.runs / "ended/job.json")["finished"]["handle"]})
    with room.FileLock(places.runs / "stopped/.lock"):
        cleared = clear(places)
    assert {one.name: one.why for one in cleared.kept}["ended"] == "Run stopped, which stays, goes on from its student."
    assert (places.runs / "ended/student-2/diffusion_model.safetensors").is_file() and start_of(places)


def test_a_start_that_is_being_made_and_what_the_graph_may_use_stay(places):
    with room.FileLock(places.starts.with_name(".starts.lock")):
        cleared = clear(places, lambda path: "It is named." if path.name == "ended" else "")
    assert {one.name: one.why for one in cleared.kept} == {"ended": "It is named.", "starts": "One is being made now."}
    assert sorted(path.name for path in places.runs.iterdir()) == ["ended"] and start_of(places)


def test_a_removal_that_is_cut_short_leaves_nothing_that_a_job_takes_for_its_own(places, made, monkeypatch):
    class Killed(BaseException):
        pass

    def torn(folder, **_):
        next(path for path in Path(folder).rglob("*.safetensors")).unlink()
        raise Killed

    before = sum(one.bytes for one in used(places).values())
    starts = start_of(places).name
    for _ in range(2):                      # the one run, then the other
        with monkeypatch.context() as context, pytest.raises(Killed):
            context.setattr(room.shutil, "rmtree", torn)
            clear(places)
    left = used(places)
    assert left["runs"].count == 0 and 0 < sum(one.bytes for one in left.values()) < before
    assert all(finished_from_disk(RunFolder(places.runs / name)) is None and not (places.runs / name).exists() for name in ("ended", "stopped"))
    assert (places.starts / starts / "start.json").is_file()
    assert clear(places).freed == sum(one.bytes for one in left.values()) and files(places.runs) == {}


def test_what_the_system_does_not_let_go_is_whole_and_told(places, monkeypatch):
    before = files(places.runs / "ended")

    def rename(source, goal):
        if Path(source).name == "ended":
            raise PermissionError(13, "in use")
        os.replace(source, goal)

    monkeypatch.setattr(room, "patiently", lambda move, source, goal: rename(source, goal))
    cleared = clear(places)
    assert names(cleared) == {"ended", f"start {start_of(places).name}"} and "does not let it go" in cleared.kept[0].why
    assert files(places.runs / "ended") == before


def test_work_that_is_nowhere_else_is_named_until_it_is_saved(places, made, models):
    assert lost(places.runs, []) == {"unsaved": ["ended"], "unfinished": ["stopped"]}
    assert lost(places.runs, [], lambda path: "held" * (path.name == "ended")) == {"unsaved": [], "unfinished": ["stopped"]}
    ended = finished_from_disk(RunFolder(places.runs / "ended")).handle

    def save(card, name, **options):
        with ended.open() as opened:
            return write_student(models / name, config=ended.config, tensors=opened.tensors(), card=card, **options).file

    other = RunFolder(places.runs / "ended").noted("finished")["handle"]["card"]
    other = type(ended.card).from_json({**other, "measured": {**other["measured"], "held_out_error": 0.5}})
    (models / "text.safetensors").write_text("no model", encoding="utf-8")
    found = [models / "gone.safetensors", models / "text.safetensors", start_of(places) / "diffusion_model.safetensors", save(other, "another")]
    assert lost(places.runs, found)["unsaved"] == ["ended"]
    for file in (save(ended.card, "folder"), save(ended.card, "single.safetensors", layout="single file", dtype=torch.float16)):
        assert lost(places.runs, [*found, file])["unsaved"] == []


def test_a_lora_and_a_gguf_count_as_saved_too(tmp_path):
    from wanlite_model.formats.gguf_write import write_gguf
    setting = Setting(tmp_path, prompts=2, depth=6)
    *_, ended = setting.events(setting.job(steps=1, recipe={"rank": 2}), "runs/adapted")
    handle, runs = ended.handle, tmp_path / "runs"
    assert lost(runs, [])["unsaved"] == ["adapted"]
    lora = save_lora(tmp_path / "saved.safetensors", read_lora(Path(handle.loras[0]), handle.config), card=handle.card).file

    def read(wanted):
        with handle.open() as opened:
            yield from opened.tensors(wanted)

    packed = write_gguf(tmp_path / "packed.gguf", config=handle.config, read=read, kind="Q8_0", card=handle.card).file
    for file in (lora, packed):
        assert lost(runs, [file])["unsaved"] == []


def test_a_student_that_was_cleared_is_a_sentence(places, made):
    start = made.student.to_json() | {"folder": str(start_of(places))}
    handle = StudentHandle.from_json(start)
    clear(places)
    for use in (handle.check_present, handle.load):
        with pytest.raises(WanLiteError, match="not on disk any more.* Queue its graph again"):
            use()


def test_samples_and_what_a_killed_job_or_the_system_left_in_a_run_are_no_strangers(places):
    (places.runs / "ended/samples").mkdir()
    (places.runs / "ended/samples/step-2.png").write_bytes(b"0")
    (places.runs / "ended/.DS_Store").write_bytes(b"0")
    (places.runs / "stopped/.checkpoint.safetensors.0123abcd.tmp").write_bytes(b"0")
    assert names(clear(places)) == set()
