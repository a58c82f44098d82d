"""A run that is killed while the teacher's answers, a checkpoint and an evaluation are made: nothing is lost. And the check itself sees what is."""
import os
import random
import shutil
import signal
import time

import pytest
import torch
from helpers_compress import result_of
from helpers_tiny import random_bank, random_teacher
from safetensors.torch import load_file, save_file

from benchmarks.kills import FEWEST, MOMENTS, SAVE_EVERY, Kill, Watched, command, differences, planned, strike, unreadable
from wanlite_model.compress.build import create_student
from wanlite_model.distill import inputs
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.data import plan_units
from wanlite_model.distill.inputs import Inputs
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.teacher import FileTeacher

SHAPE, STEPS = (16, 3, 16, 16), 24


def prepared(folder):
    """Two folders of one job, each with a cache of its own, and how many answers it asks for."""
    bank = random_bank(8)
    random_teacher().module.save_pretrained(folder / "wan")
    teacher = FileTeacher(folder / "wan", shift=3.0, device=torch.device("cpu"))
    student, _ = result_of(create_student(teacher, bank, SHAPE, depth=3, method="interleaved", folder=folder / "starts"))
    job = DistillJob(student=student.fingerprint, teacher=teacher.fingerprint, prompts=bank.fingerprint, shape=SHAPE, shift=3.0, cfg=3.0, steps=STEPS,
                     recipe=Recipe(learning_rate=1e-3, batch_size=8, warmup=2, teacher_steps=2, evaluations=8, ema_decay=0.5, save_every=SAVE_EVERY))
    runs = [folder / "straight", folder / "killed"]
    for run in runs:
        for _ in inputs.prepare(RunFolder(run), job, Inputs(student=student, prompts=bank), teacher, folder / f"{run.name}-cache", lambda _: folder / "wan"):
            pass
    return *runs, len(plan_units(job, bank, None))


def stopped(watched, step):
    """A session that is asked to stop after a step, and saves that."""
    before, session = watched.stamps(), command(watched.folder)
    while watched.done(before) < (watched.answers, step):
        assert session.process.poll() is None
        time.sleep(0.02)
    session.process.terminate()
    assert session.process.wait(timeout=60) == 128 + signal.SIGTERM


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals to send")
def test_a_run_that_is_killed_three_times_ends_with_the_same_bits(tmp_path, monkeypatch):
    """The run without a stop goes on beside it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    straight, killed, answers = prepared(tmp_path)
    whole = command(straight)
    watched = Watched(folder=killed, cache=tmp_path / "killed-cache", answers=answers)

    def killed_in(moment, *after):
        found = strike(lambda: command(killed), watched, Kill(moment=moment, after=after, delay=0.0))
        assert found.moment == moment and not found.unreadable and not found.wrong, found
        return found.redone

    assert killed_in("writing an answer", 1, 0) == 0
    stopped(watched, STEPS // 3)                        # or a fast machine has no checkpoint yet that could be gone on from
    assert killed_in("writing checkpoint.safetensors", answers, STEPS // 3) > 0
    assert killed_in("evaluating", answers, 2 * STEPS // 3) > 0 and STEPS // 3 <= watched.progress().saved < STEPS
    assert [session.process.wait(timeout=120) for session in (command(killed), whole)] == [0, 0]
    assert [row["step"] for row in RunFolder(killed).rows("step")] == list(range(1, STEPS + 1))
    assert differences(straight, killed) == []


def test_a_file_that_was_torn_and_a_weight_that_differs_are_seen(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "student-1").mkdir(parents=True)
    for name in ("checkpoint", "best", "student-1/diffusion_model"):
        save_file({"weight": torch.zeros(4)}, one / f"{name}.safetensors", {"step": "1"})
    (one / "metrics.jsonl").write_text('{"kind": "step"}\n')
    shutil.copytree(one, other)
    watched = Watched(folder=other, cache=tmp_path / "cache", answers=1)
    assert differences(one, other) == [] and list(unreadable(watched)) == []
    weights = load_file(one / "best.safetensors")
    save_file({"weight": -weights["weight"]}, other / "best.safetensors", {"step": "1"})         # -0.0, which is equal to 0.0
    save_file(weights, other / "student-1/diffusion_model.safetensors", {"step": "2"})
    assert differences(one, other) == ["best.safetensors", "student-1/diffusion_model.safetensors"]
    for name in ("best.safetensors", "metrics.jsonl"):
        (other / name).write_bytes((other / name).read_bytes()[:-4])
    assert [told.split()[0] for told in unreadable(watched)] == ["best.safetensors", "metrics.jsonl"]


@pytest.mark.parametrize("kills", [FEWEST, 20, 33])
def test_every_moment_has_a_kill_and_both_doors_have_them_in_turn(kills):
    plan = planned(kills, 48, 40, random.Random(kills))
    assert len(plan) == kills and {kill.moment for _, kill in plan} == set(MOMENTS)
    first = next(i for i, (_, kill) in enumerate(plan) if kill.after[0] == 48) + 1         # the start is evaluated by the side that asked the teacher
    assert {door for door, _ in plan[:first]} == {"graph"}
    assert all(one != other for (one, _), (other, _) in zip(plan[first:], plan[first + 1:]))
