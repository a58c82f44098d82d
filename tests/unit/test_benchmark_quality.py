"""The quality table: its rows hold together, its scores mean what they say, and the second world's judge reads what was rendered."""
import dataclasses
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import teachers
from benchmarks.bars import BARS, adherence, read
from benchmarks.quality import score, work
from benchmarks.quality.__main__ import FULL_SIZE, QUICK_SIZE, unsettled
from benchmarks.quality.rows import ablations, chosen, moved, rows
from benchmarks.quality.table import table
from benchmarks.quality.task import Task
from benchmarks.swapped import SWAPPED, swapped
from demo.world import BALLS
from wanlite_model.distill.job import DistillJob
from wanlite_model.distill.presets import PRESETS


def test_every_row_has_a_name_of_its_own_and_finds_what_it_needs():
    everything = (*rows(), *ablations())
    assert {row.lora_of for row in moved()} - {""} <= {row.name for row in rows()}
    names = [row.name for row in everything]
    assert len(set(names)) == len(names)
    assert all(set(row.needs) <= set(names[:i]) for i, row in enumerate(everything))
    assert {"teacher", "plain cut", "from scratch", "plain baseline", *PRESETS} <= set(names)
    assert [row.name for row in chosen(["slim + few-step 4"], everything)] == ["slim", "slim + few-step 4"]


def test_a_result_is_known_again_only_for_the_same_row(tmp_path):
    first, second = rows()[0], rows()[1]
    task = Task(row=first, world="balls", seed=0, videos=8, home=tmp_path)
    assert task.result() is None
    task.folder.mkdir(parents=True)
    (task.folder / "scores.json").write_text(f'{{"key": "{task.key}", "scores": {{"right": 3}}}}')
    assert task.result() == {"right": 3}
    for changed in ({"videos": 9}, {"row": dataclasses.replace(first, steps=29)}):
        assert dataclasses.replace(task, **changed).result() is None
    assert dataclasses.replace(task, row=second).folder != task.folder != dataclasses.replace(task, seed=1).folder


def test_what_a_row_trained_is_forgotten_only_when_it_would_train_something_else_now(tmp_path):
    job = DistillJob(student="s", teacher="t", prompts="p", shape=(16, 3, 8, 8), shift=5.0, cfg=4.0, steps=10)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.json").write_text(json.dumps({"job": job.to_json()}))
    work.forget_another(job, tmp_path / "run")
    assert (tmp_path / "run").exists()
    work.forget_another(dataclasses.replace(job, steps=11), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    work.forget_another(job, tmp_path / "run")


def test_ablations_are_judged_on_fewer_videos():
    by_kind = {row.kind: FULL_SIZE.videos_of(row) for row in FULL_SIZE.rows("balls")}
    assert by_kind == {"teacher": 1024, "baseline": 1024, "preset": 1024, "ablation": 256} and QUICK_SIZE.videos_of(ablations()[0]) == 64


def test_the_table_puts_seeds_together():
    scores = {"right": 60, "videos": 64, "error": 0.02, "psnr": 30.0, "parameters": 2e6, "right, held out": 0.5, **{f"error {b}/4": 0.1 * b for b in range(1, 5)}}
    row = rows()[0]
    text = table([(row, scores), (row, {**scores, "right": 64, "error": 0.04})])
    line = text.splitlines()[-1]
    assert line.startswith("| teacher | 0.969 [0.893, 0.991] | 0.500 | 0.0300 | 0.100 0.200 0.300 0.400 |") and "| 2.00 |" in line and "| - |" in line


def test_scores_of_a_clip_are_ratios_to_the_teachers():
    clips = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8, 3), dtype=np.uint8)
    same = score.compared(clips, clips)
    assert same["psnr"] > 100 and [same[name] for name in ("sharpness", "motion", "saturation")] == pytest.approx([1.0] * 3)
    dim = score.compared(clips // 2, clips)
    assert [dim[name] for name in ("sharpness", "motion", "saturation")] == pytest.approx([0.5] * 3, abs=0.01)
    still = np.repeat(clips[:, :1], 4, axis=1)
    assert score.compared(still, clips)["motion"] == 0 and "motion" not in score.compared(clips[:, :1], clips[:, :1])
    several = clips.repeat(score.VARIED_PROMPTS * score.VARIED_SEEDS, axis=0)[:score.VARIED_PROMPTS * score.VARIED_SEEDS]
    assert score.spread(several) == 0


def test_the_states_of_the_table_are_the_teachers_and_reach_low_noise():
    from helpers_tiny import random_wan
    teacher = random_wan(depth=1)
    world = dataclasses.replace(BALLS, latents=(16, 1, 4, 4))
    states = score.teacher_states(teacher, world, world.latents, 3.0, 2)
    assert states["sigma"].min() < 0.2 and states["sigma"].max() == 1
    with torch.no_grad():
        reference = score.Reference(world=world, pairs=[], clips=np.zeros(0), varied=np.zeros(0), states={"own": states})
        guided, plain = (score.velocity_scores(teacher, reference, cfg) for cfg in (3.0, 1.0))
        known = [score.velocity_scores(None, reference, cfg) for cfg in (3.0, 1.0)]
    assert guided["error"] < 1e-10 and guided["closure"] == pytest.approx(1.0)
    assert plain["error"] > 1e-6 and plain["closure"] == pytest.approx(0.0, abs=1e-6)
    for told, asked in zip(known, (guided, plain)):     # what the teacher answers need not be asked again
        assert told.keys() == asked.keys() and all(told[name] == pytest.approx(asked[name], abs=1e-6, nan_ok=True) for name in told)


def test_the_changed_world_shows_the_other_of_each_pair():
    prompt = SWAPPED.prompts[0]
    assert swapped(swapped(prompt)) == prompt and all(swapped(p) in BALLS.prompts for p in SWAPPED.prompts)
    turned = next(p for p in SWAPPED.prompts if "left" in p.split() and "red" in p.split())
    clip = SWAPPED.render(turned, 3)
    assert all(SWAPPED.adherence(clip, turned).values()) and not any(BALLS.adherence(clip, turned)[name] for name in ("motion", "colour"))
    assert set(SWAPPED.held_out) & set(SWAPPED.training) == set() and len(SWAPPED.held_out) == len(BALLS.held_out)
    assert not set(map(swapped, SWAPPED.held_out)) - set(BALLS.held_out)        # its clips are those that the first teacher never saw either


def test_tasks_wait_for_what_they_need_and_nobody_asks_twice(tmp_path):
    table = {row.name: row for row in (*rows(), *ablations(), *moved())}
    task = Task(row=table["slim + few-step 4"], world="balls", seed=1, videos=8, home=tmp_path)
    assert task.needs == [tmp_path / "balls" / "slim-1"]
    healed = Task(row=table["the same, healed"], world="swapped", seed=1, videos=8, home=tmp_path)
    assert healed.needs == [tmp_path / "balls" / "few-step-4-1"]
    of = {name: dataclasses.replace(task, row=table[name]).cache for name in ("teacher", "slim", "no-cfg", "few-step 8", "few-step 4", "slim of few-step 4")}
    assert of["teacher"] is None and of["slim"] == of["no-cfg"] and len(set(of.values())) == 5


def test_what_follows_a_row_that_is_trained_anew_is_trained_anew(tmp_path):
    table = {row.name: row for row in rows()}
    tasks = [Task(row=table[name], world="balls", seed=0, videos=8, home=tmp_path) for name in ("teacher", "slim", "slim + few-step 4")]
    for task in tasks:
        task.folder.mkdir(parents=True)
        (task.folder / "scores.json").write_text(json.dumps({"key": task.key, "scores": {}}))
    assert unsettled(tasks) == []
    other = dataclasses.replace(tasks[1], row=dataclasses.replace(table["slim"], training=3))
    assert unsettled([tasks[0], other, tasks[2]]) == [other, tasks[2]]


def test_all_that_the_rows_are_compared_with_is_made(monkeypatch, tmp_path):
    """Rows of fewer videos, the ablations, come last, and must not decide for the others."""
    made = []
    monkeypatch.setattr(work, "refer", lambda task, part, device: made.append(part))
    pool = SimpleNamespace(submit=lambda function, *given: SimpleNamespace(result=lambda: function(*given)))
    work.prepare([Task(row=row, world="balls", seed=0, videos=FULL_SIZE.videos_of(row), home=tmp_path / "full") for row in FULL_SIZE.rows("balls")], "cpu", pool)
    assert sum(part.startswith("clips") for part in made) == 2 * 1024 / score.PART          # of clips and of single frames


def test_bars_are_read_back_and_held_out_prompts_stay_out():
    assert len(BARS.prompts) == 192 and len(BARS.held_out) == 32 and len(BARS.training) == 160
    assert all(all(adherence(BARS.render(prompt, seed), prompt).values()) for seed, prompt in enumerate(BARS.prompts))
    blank = np.full((9, 64, 64, 3), 0.1)
    assert read(blank) == {"change": None, "colour": None, "shape": None, "place": None, "wall": "black"}
    rng = random.Random(0)
    assert all(BARS.corrupted(prompt, rng, 0.0) == prompt for prompt in BARS.prompts[:20])
    changed = [BARS.corrupted(BARS.prompts[0], rng, 0.5) for _ in range(200)]
    assert set(changed) <= set(BARS.prompts) and 1 < len(set(changed)) and not math.isclose(changed.count(BARS.prompts[0]), 200)


def test_a_world_starts_where_a_stock_sampler_with_that_seed_starts():
    (prompt, noise), = BALLS.pairs(1, first=7)
    assert prompt in BALLS.prompts and torch.equal(noise, torch.randn(BALLS.latents, generator=torch.Generator().manual_seed(7)))
    assert BALLS.bank().prompts == BALLS.training and not set(BALLS.training) & set(BALLS.held_out)


def test_a_teacher_that_another_recipe_trained_is_trained_anew(tmp_path, monkeypatch):
    world, begun = dataclasses.replace(SWAPPED, teacher=tmp_path / "teacher.safetensors"), []

    class Begun(Exception):
        pass

    def begin(*given):
        begun.append(given)
        raise Begun
    monkeypatch.setattr(teachers, "WORK", tmp_path)
    monkeypatch.setattr(teachers, "Vae", lambda file: SimpleNamespace(encode=None))
    monkeypatch.setattr(teachers.train_teacher, "encode_clips", begin)
    with pytest.raises(Begun):
        teachers.train(world)
    key = begun[0][3].parent.name.removeprefix("swapped-")
    save_file({"x": torch.zeros(1)}, world.teacher, metadata={teachers.RECIPE_KEY: key})
    teachers.train(world)
    monkeypatch.setitem(teachers.RECIPES, "swapped", dataclasses.replace(teachers.RECIPES["swapped"], steps=7))
    with pytest.raises(Begun):
        teachers.train(world)
