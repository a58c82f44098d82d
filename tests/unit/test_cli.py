"""A run from its folder alone: to the same weights, with exit statuses that a script can rely on."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_compress import result_of
from helpers_distill import RECIPE, SHAPE, same
from helpers_tiny import random_bank, random_teacher
from safetensors.torch import load_file

from wanlite_model import cli
from wanlite_model.compress.build import create_student
from wanlite_model.distill import inputs
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.checks import lora_fingerprint
from wanlite_model.distill.events import Step
from wanlite_model.distill.inputs import Inputs
from wanlite_model.distill.job import DistillJob
from wanlite_model.distill.trainer import run
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.lora import Factors, Lora
from wanlite_model.teacher import FileTeacher

ROOT = Path(__file__).resolve().parents[2]

class Prepared:
    """A teacher in a file, and jobs on it."""

    def __init__(self, folder):
        self.folder, self.bank = folder, random_bank(3)
        random_teacher().module.save_pretrained(folder / "wan")
        self.teacher = FileTeacher(folder / "wan", shift=3.0, device=torch.device("cpu"))
        self.student, _ = result_of(create_student(self.teacher, self.bank, SHAPE, depth=4, ffn_dim=256, keep=None, method="interleaved", seed=0,
                                                  folder=folder / "starts"))

    def job(self, **changes):
        return DistillJob(**{"student": self.student.fingerprint, "teacher": self.teacher.fingerprint, "prompts": self.bank.fingerprint, "shape": SHAPE,
                             "shift": 3.0, "cfg": 3.0, "steps": 6, "recipe": RECIPE, **changes})

    def prepare(self, name, file=None, **changes):
        for _ in inputs.prepare(RunFolder(self.folder / name), self.job(**changes), Inputs(student=self.student, prompts=self.bank), self.teacher,
                                self.folder / f"cache of {name}", lambda _: file):
            pass
        return self.folder / name

    def events(self, name, **changes):
        return run(self.job(**changes), self.folder / name, self.folder / f"cache of {name}", self.teacher, self.student, self.bank)

    def state(self, name):
        return load_file(self.folder / name / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    made = Prepared(tmp_path_factory.mktemp("cli"))
    list(made.events("straight"))
    return made


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def command(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "wanlite_model", *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **options)


def test_a_prepared_folder_taken_elsewhere_runs_to_the_same_weights(prepared, capsys):
    """With the start, the prompts and the teacher in it: what it was made from is gone."""
    folder = prepared.prepare("taken")
    moved = prepared.folder / "another drive" / "taken"
    moved.parent.mkdir()
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    away = prepared.folder / "starts away"
    (prepared.folder / "starts").rename(away)
    try:
        assert cli.main(["run", str(moved), "--cache", str(moved / "cache")]) == 0
    finally:
        away.rename(prepared.folder / "starts")
    told = lines(capsys.readouterr().out)
    assert [line["step"] for line in told if "step" in line] == [1, 2, 3, 4, 5, 6] and [line["evaluated"] for line in told if "evaluated" in line] == [3, 6]
    assert told[-1]["finished"] == str(moved / "student-6") and "Held-out error" in told[-1]["report"]
    assert same(prepared.state("straight"), load_file(moved / "checkpoint.safetensors"))


def test_graph_and_command_take_turns_and_end_at_the_same_weights(prepared, capsys):
    halted = prepared.events("turns")
    next(event for event in halted if isinstance(event, Step) and event.step == 2)
    halted.close()
    assert cli.main(["run", str(prepared.folder / "turns"), "--steps", "6"]) == 0          # all the answers are there: no teacher is needed
    assert [line["step"] for line in lines(capsys.readouterr().out) if "step" in line] == [3, 4, 5, 6]
    assert same(prepared.state("straight"), prepared.state("turns"))
    *_, ended = prepared.events("turns")
    assert ended.handle.folder == str(prepared.folder / "turns" / "student-6")


def test_without_a_teacher_a_run_that_lacks_answers_says_what_to_name(prepared, capsys):
    halted = prepared.events("no teacher")
    next(halted)
    halted.close()
    assert cli.main(["run", str(prepared.folder / "no teacher")]) == 1
    assert "Name its file with --teacher" in capsys.readouterr().err
    assert cli.main(["run", str(prepared.folder / "no teacher"), "--teacher", str(prepared.folder / "wan")]) == 0
    assert same(prepared.state("straight"), prepared.state("no teacher"))


def test_another_wan_is_refused_as_the_teacher(prepared, capsys):
    folder = prepared.prepare("another", file=prepared.folder / "wan")
    random_teacher(seed=9).module.save_pretrained(prepared.folder / "other")
    assert not (folder / "teacher").exists()                # its file is there to be opened
    assert cli.main(["run", str(folder), "--teacher", str(prepared.folder / "other")]) == 1
    assert "is not the teacher of this run" in capsys.readouterr().err
    assert cli.main(["run", str(folder)]) == 0


def test_shards_fill_one_cache_between_them(prepared, capsys):
    folder = prepared.prepare("shards")
    counts = []
    for shard in ("1/2", "2/2"):
        assert cli.main(["cache", str(folder), "--shard", shard]) == 0
        counts.append(len(list((prepared.folder / "cache of shards").glob("*.safetensors"))))
    whole = {path.name for path in (prepared.folder / "cache of straight").glob("*.safetensors")}
    assert {path.name for path in (prepared.folder / "cache of shards").glob("*.safetensors")} == whole and counts[1] == len(whole)
    shutil.rmtree(folder / "teacher")
    assert cli.main(["run", str(folder)]) == 0              # from the cache alone
    assert same(prepared.state("straight"), prepared.state("shards"))


@pytest.mark.parametrize("arguments", [["--shard", "3/2"], ["--shard", "x"]], ids=str)
def test_a_shard_that_cannot_be_is_a_wrong_command(prepared, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["cache", str(prepared.folder / "straight"), *arguments])
    assert ended.value.code == 2


def test_a_folder_that_is_no_run_and_a_run_without_a_length_are_sentences(prepared, tmp_path, capsys):
    assert cli.main(["run", str(tmp_path / "nothing")]) == 1 and cli.main(["run", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("is not the folder of a run") == 2
    folder = prepared.prepare("endless", steps=0, minutes=0.0)
    assert cli.main(["run", str(folder)]) == 1
    assert "Say --steps or --minutes" in capsys.readouterr().err
    assert cli.main(["run", str(folder), "--steps", "2"]) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_with_its_last_step_saved_and_it_goes_on(prepared, number):
    name = f"signal {number}"
    folder = prepared.prepare(name, steps=4000)
    process = command("run", folder)
    for line in process.stdout:
        if json.loads(line).get("step") == 3:
            process.send_signal(number)
            break
    out, error = process.communicate(timeout=120)
    last = [line["step"] for line in lines(out) if "step" in line] or [3]
    assert process.returncode == 128 + number, error
    with torch.no_grad():
        assert RunFolder(folder).rows("step")[-1]["step"] == max(last)
    again = command("run", folder)
    first = next(line for line in map(json.loads, again.stdout) if "step" in line)
    again.kill()
    again.communicate()
    assert first["step"] == max(last) + 1


def test_the_bar_is_on_standard_error_and_every_line_of_standard_output_is_json(prepared):
    folder = prepared.prepare("lines")
    process = command("run", folder)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and len(lines(out)) > 10 and "training" in error
    assert dataclasses.asdict(prepared.job())["steps"] == 6


def test_clips_and_a_lora_to_begin_with_lie_in_the_folder_bit_for_bit(prepared):
    draw = torch.Generator().manual_seed(0)
    factors = {"blocks.1.ffn.2": Factors(down=torch.randn(3, 256, generator=draw).bfloat16(), up=torch.randn(128, 3, generator=draw).half(), scale=0.7)}
    lora, latents = Lora(factors=factors, diffs={"blocks.0.norm3.bias": torch.ones(128)}), torch.randn(3, *SHAPE, generator=draw)
    files = RunFolder(prepared.folder / "parts")
    files.path.mkdir()
    parts = Inputs(student=prepared.student, prompts=prepared.bank, latents=latents, start_from=lora)
    inputs.keep(files, parts, prepared.teacher, prepared.folder / "cache")
    found = inputs.read(files)
    assert lora_fingerprint(found.start_from) == lora_fingerprint(lora) and torch.equal(found.latents, latents)
    assert found.prompts.fingerprint == prepared.bank.fingerprint and found.student == prepared.student
    (files.path / "latents.safetensors").write_bytes(b"torn")
    with pytest.raises(WanLiteError, match="is damaged"):
        inputs.read(files)
