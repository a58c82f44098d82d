"""Creating a student: on disk at once or not at all, the same request once, and a report that says what was measured."""
import json
from dataclasses import replace

import pytest
import torch
from helpers_compress import SHAPE, counting_teacher, result_of
from helpers_tiny import random_bank

from wanlite_model.compress import build
from wanlite_model.compress.build import create_student
from wanlite_model.compress.depth import DepthChoice
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.compress.plan import CompressionPlan
from wanlite_model.compress.walk import Walk
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.neurons import from_mask
from wanlite_model.transformer import WanLiteStudent


def tiny(**fields):
    return counting_teacher(**{"depth": 4, "ffn_dim": 64, **fields})


def create(folder, teacher=None, bank=None, shape=SHAPE, **request):
    return create_student(teacher or tiny(), bank or random_bank(), shape, folder=folder, **{"depth": 3, "cfg": 3.0, **request})


@pytest.fixture
def few_states(monkeypatch):
    monkeypatch.setattr(build, "MOST_HEALING", 32)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_start_is_written_whole_and_says_what_it_is(tmp_path):
    teacher = tiny(depth=6, idle=[3])
    handle, report = result_of(create(tmp_path, teacher, depth=5, ffn_dim=40))
    assert files(tmp_path)[0] == handle.fingerprint and handle.file.is_file()
    assert handle.config == teacher.config.resized(num_layers=5, ffn_dim=40)
    assert replace(handle.plan, ffn_kept=()) == CompressionPlan(keep=(0, 1, 2, 4, 5), ffn_dim=40, method="spaced", teacher_layers=6, teacher_ffn_dim=64)
    student = WanLiteStudent.from_pretrained(handle.folder)
    assert f"{student.num_parameters() / 1e6:.2f} million" in report and f"{teacher.module.num_parameters() / 1e6:.2f} million" in report
    assert "0-2,4-5" in report and "40 of 64" in report
    measured = handle.card.measured
    assert measured["start_error"] < measured["plain_cut_error"]
    assert f"{measured['start_error']:.1%}" in report and f"{measured['plain_cut_error']:.1%}" in report
    assert handle.card.shift == teacher.shift and handle.card.keep == handle.plan.keep


@pytest.mark.parametrize("healing", [{}, {"refit": "least squares", "block_steps": 5}])
def test_pruning_nothing_writes_the_teacher_bit_for_bit_without_a_forward(tmp_path, healing):
    teacher = tiny(depth=3, dtype=torch.bfloat16)
    handle, report = result_of(create(tmp_path, teacher, depth=None, **healing))
    with handle.open() as source:
        written = dict(source.tensors())
    for name, tensor in teacher.module.state_dict().items():
        assert written[name].dtype == torch.bfloat16 and torch.equal(written[name], tensor), name
    assert "bit for bit" in report and teacher.forwards == 0


def test_whole_blocks_measure_the_same_through_the_teacher_as_through_the_student(tmp_path):
    teacher = tiny(depth=5)
    handle, _ = result_of(create(tmp_path, teacher, depth=3, method="interleaved"))
    assert handle.card.measured["start_error"] == handle.card.measured["plain_cut_error"] > 0
    probe = result_of(build.make_probe(teacher, random_bank(), SHAPE, seed=0, count=build.DEPTH_STATES + build.HELD_OUT, cfg=3.0))[-build.HELD_OUT:]
    student = build.ModuleTeacher(WanLiteStudent.from_pretrained(handle.folder), shift=3.0)
    target = torch.cat(list(build.answers(teacher.velocity, probe)))
    error = torch.cat(list(build.velocity_errors(student.velocity, probe, target))).mean().item()
    assert handle.card.measured["start_error"] == pytest.approx(error, rel=1e-4)


def test_the_same_request_is_found_again_without_asking_the_teacher(tmp_path):
    first = result_of(create(tmp_path, ffn_dim=48))
    teacher = tiny()
    steps = create(tmp_path, teacher, ffn_dim=48)
    assert result_of(steps) == first and teacher.forwards == teacher.passes == 0


def test_a_folder_that_was_moved_is_found_where_it_is_now(tmp_path):
    handle, _ = result_of(create(tmp_path / "old", method="interleaved"))
    (tmp_path / "old").rename(tmp_path / "new")
    again, _ = result_of(create(tmp_path / "new", method="interleaved"))
    assert again.file == tmp_path / "new" / handle.fingerprint / handle.file.name and again.file.is_file()


@pytest.mark.parametrize("damage", ["cut weights", "no weights", "torn note", "note of another version"])
def test_a_damaged_start_is_made_again(tmp_path, damage):
    handle, report = result_of(create(tmp_path, method="interleaved"))
    whole, note = handle.file.read_bytes(), handle.file.parent / build.NOTE
    if damage == "cut weights":
        handle.file.write_bytes(whole[:-1])
    elif damage == "no weights":
        handle.file.unlink()
    else:
        note.write_text("{" if damage == "torn note" else json.dumps({"handle": {"folder": ""}, "report": "", "bytes": len(whole)}), encoding="utf-8")
    assert result_of(create(tmp_path, method="interleaved")) == (handle, report)
    assert handle.file.read_bytes() == whole


def test_whatever_decides_a_start_changes_its_fingerprint(tmp_path, few_states):
    def fingerprint(**request):
        return result_of(create(tmp_path, **{"method": "interleaved", **request}))[0].fingerprint

    requests = [{}, {"depth": 2}, {"depth": None, "keep": (0, 1, 3)}, {"method": "greedy"}, {"ffn_dim": 48}, {"seed": 1}, {"cfg": 2.0},
                {"method": "spaced"}, {"method": "influence"}, {"refit": "mean"}, {"refit": "least squares"}, {"block_steps": 1},
                {"shape": (16, 1, 8, 4)}, {"bank": random_bank(3)}, {"teacher": tiny(seed=1)},
                {"teacher": tiny(shift=5.0)}]
    assert len({fingerprint(**request) for request in requests}) == len(requests)


def test_what_is_not_measured_does_not_split_the_cache(tmp_path):
    """A copy of the teacher is gigabytes: other prompts must not write it again."""
    first, _ = result_of(create(tmp_path, depth=None))
    second, _ = result_of(create(tmp_path, depth=None, bank=random_bank(2, seed=5), seed=3))
    assert first == second


@pytest.mark.parametrize("request_", [{"ffn_dim": 48}, {"method": "influence", "refit": "mean", "block_steps": 2}])
def test_closing_at_any_moment_leaves_nothing(tmp_path, few_states, request_):
    total = sum(1 for _ in create(tmp_path / "whole", **request_))
    for stop in sorted({1, 2, total // 4, total // 2, 3 * total // 4, total - 1, total}):
        folder = tmp_path / str(stop)
        steps = create(folder, **request_)
        for _ in range(stop):
            next(steps)
        steps.close()
        assert not folder.exists() or files(folder) == []


def test_a_teacher_that_fails_while_it_is_written_leaves_nothing(tmp_path):
    teacher = tiny(depth=3)

    def interrupted():
        for i, pair in enumerate(type(teacher).weights(teacher)):
            if i == 20:
                raise KeyboardInterrupt
            yield pair

    teacher.weights = interrupted
    with pytest.raises(KeyboardInterrupt):
        result_of(create(tmp_path, teacher, depth=None))
    assert files(tmp_path) == []


def test_what_a_power_cut_left_is_cleared_away(tmp_path):
    handle, _ = result_of(create(tmp_path / "elsewhere", method="interleaved"))
    left = tmp_path / "here" / f".{handle.fingerprint}.partial"
    left.mkdir(parents=True)
    (left / "junk").write_bytes(b"half")
    result_of(create(tmp_path / "here", method="interleaved"))
    assert not left.exists()


@pytest.mark.parametrize("request_, sentence", [
    ({"depth": 5}, "The teacher has 4 blocks"), ({"depth": 0}, "depth is 0"), ({"ffn_dim": 65}, "64 FFN neurons"),
    ({"keep": (0, 1)}, "depth is 3 and the keep-map has 2 blocks"), ({"depth": None, "keep": (0, 4)}, "block 4"),
    ({"method": "given"}, "interleaved, greedy, spaced or influence"), ({"refit": "median"}, "none, mean, least squares"), ({"shape": (4, 1, 8, 8)}, "This teacher takes"),
])
def test_a_request_that_cannot_be_met_is_one_sentence_before_any_work(tmp_path, request_, sentence):
    teacher = tiny()
    with pytest.raises(WanLiteError) as error:
        result_of(create(tmp_path, teacher, **request_))
    assert sentence in str(error.value) and files(tmp_path) == [] and teacher.forwards == teacher.passes == 0


@pytest.mark.parametrize("request_, sentence", [
    ({"method": "greedy"}, "choose interleaved"), ({"method": "influence"}, "influence watches the teacher"), ({"ffn_dim": 48}, "keep ffn_dim at 64"),
    ({"refit": "mean"}, "leave refit at none"), ({"block_steps": 5}, "block_steps at 0"),
])
def test_what_needs_prompts_says_so(tmp_path, request_, sentence):
    with pytest.raises(WanLiteError, match=sentence):
        result_of(create_student(tiny(), None, SHAPE, **{"depth": 3, "method": "interleaved", **request_}, folder=tmp_path))


def test_without_prompts_blocks_are_cut_and_nothing_is_claimed(tmp_path):
    teacher = tiny()
    handle, report = result_of(create_student(teacher, None, SHAPE, keep=(0, 2), folder=tmp_path))
    assert handle.plan.keep == (0, 2) and handle.plan.method == "given" and teacher.forwards == 0
    assert "not measured, because there were no prompts" in report and handle.card.measured == {}


def test_a_start_that_does_not_fit_beside_the_teacher_is_written_and_not_measured(tmp_path, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("full")
        yield

    monkeypatch.setattr(build, "_loaded", full)
    handle, report = result_of(create(tmp_path, ffn_dim=48))
    assert handle.file.is_file() and "does not fit beside the teacher" in report


@pytest.mark.parametrize("request_", [{}, {"method": "influence", "refit": "least squares", "block_steps": 2}])
def test_it_works_inside_inference_mode_and_gives_the_same_start(tmp_path, few_states, request_):
    outside, _ = result_of(create(tmp_path / "outside", ffn_dim=48, **request_))
    with torch.inference_mode():
        inside, _ = result_of(create(tmp_path / "inside", ffn_dim=48, **request_))
    assert inside.file.read_bytes() == outside.file.read_bytes()


def test_a_handle_survives_json_and_is_read_off_a_saved_student(tmp_path):
    handle, _ = result_of(create(tmp_path, ffn_dim=48))
    assert StudentHandle.from_json(json.loads(json.dumps(handle.to_json()))) == handle
    found = StudentHandle.of(handle.file.parent)
    assert (found.config, found.card, found.plan.keep, found.plan.teacher_layers, found.plan.teacher_ffn_dim, found.plan.ffn_kept) == (
        handle.config, handle.card, handle.plan.keep, 4, 64, handle.plan.ffn_kept)
    assert StudentHandle.of(handle.file).plan == found.plan
    with pytest.raises(WanLiteError, match="cannot be read"):
        StudentHandle.from_json({"folder": "x"})


def test_a_student_says_which_neurons_it_kept(tmp_path):
    teacher = tiny()
    handle, _ = result_of(create(tmp_path, teacher, ffn_dim=48))
    own = teacher.module.state_dict()
    with handle.open() as source:
        for j, (block, mask) in enumerate(zip(handle.plan.keep, handle.plan.ffn_kept, strict=True)):
            kept = list(from_mask(mask))
            assert len(kept) == 48 and torch.equal(source.source.tensor(f"blocks.{j}.ffn.0.weight"), own[f"blocks.{block}.ffn.0.weight"][kept])
    assert len(handle.plan.ffn_kept[0]) == 12           # 64 bits
    assert result_of(create(tmp_path, teacher, method="interleaved"))[0].plan.ffn_kept == ()


def test_a_handle_of_any_wan_is_its_own_teacher(tmp_path):
    teacher = tiny(depth=2)
    teacher.module.save_pretrained(tmp_path / "wan")
    handle = StudentHandle.of(tmp_path / "wan")
    assert handle.plan.prunes_nothing and handle.card is None
    other = tiny(depth=2, seed=1)
    other.module.save_pretrained(tmp_path / "other")
    assert StudentHandle.of(tmp_path / "other").fingerprint != handle.fingerprint


def test_no_file_tells_where_it_was_made(tmp_path):
    result_of(create(tmp_path, method="interleaved"))
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


def test_blocks_that_learned_what_the_removed_ones_did_start_nearer_to_the_teacher(tmp_path, few_states):
    teacher = counting_teacher(depth=6)
    cut, healed = (result_of(create(tmp_path, teacher, keep=(0, 1, 4, 5), depth=None, block_steps=steps))[0] for steps in (0, 60))
    assert cut.fingerprint != healed.fingerprint
    assert healed.card.measured["start_error"] < 0.7 * cut.card.measured["start_error"]
    with cut.open() as before, healed.open() as after:
        changed = {name.split(".")[1] for (name, old), (_, new) in zip(before.tensors(), after.tensors()) if not torch.equal(old, new)}
    assert changed == {"1", "2", "3"}                       # from the first gap on; what stands before it had nothing to make up for
    assert not list(tmp_path.glob(".*")) and "trained by itself for 60 steps" in result_of(create(tmp_path, teacher, keep=(0, 1, 4, 5), depth=None, block_steps=60))[1]


def test_the_first_kept_block_learns_what_the_blocks_before_it_did(tmp_path, few_states):
    teacher = counting_teacher(depth=4)
    cut, healed = (result_of(create(tmp_path, teacher, keep=(2, 3), depth=None, block_steps=steps))[0] for steps in (0, 60))
    assert healed.card.measured["start_error"] < 0.9 * cut.card.measured["start_error"]
    with cut.open() as before, healed.open() as after:
        assert {name.split(".")[1] for (name, old), (_, new) in zip(before.tensors(), after.tensors()) if not torch.equal(old, new)} == {"0", "1"}


def test_blocks_are_healed_when_the_teacher_has_made_room_for_them(tmp_path, monkeypatch, few_states):
    teacher, told = counting_teacher(depth=4), []
    answer, velocity = Walk.answer, teacher.velocity
    monkeypatch.setattr(Walk, "answer", lambda walk, which: told.append("worked") or answer(walk, which))
    monkeypatch.setattr(teacher, "velocity", lambda *args, **kwargs: told.append("asked") or velocity(*args, **kwargs))
    monkeypatch.setattr(teacher, "release", told.append)
    result_of(create(tmp_path, teacher, keep=(0, 3), depth=None, refit="least squares", block_steps=2))
    assert "worked" in told and not any(before == "asked" and after == "worked" for before, after in zip(told, told[1:]))
    needed = {value for value in told if not isinstance(value, str)}
    block = sum(4 * value.numel() for value in teacher.module.blocks[0].parameters())
    assert len(needed) == 1 and 4 * block < needed.pop() < 2**30


def test_too_small_a_card_for_healing_is_said_in_a_sentence(tmp_path, monkeypatch, few_states):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(Walk, "answer", full)
    with pytest.raises(WanLiteError, match="too small to refit or train blocks.*lower the frames"):
        result_of(create(tmp_path, counting_teacher(depth=4), keep=(0, 3), depth=None, block_steps=2))
    assert not list(tmp_path.iterdir())


def test_the_memory_that_healing_may_take_does_not_change_its_result(tmp_path, monkeypatch, few_states):
    teacher = counting_teacher(depth=4)
    one = result_of(create(tmp_path / "a", teacher, keep=(0, 3), depth=None, block_steps=5))[0]
    monkeypatch.setattr("wanlite_model.compress.walk.MEMORY", 1)
    other = result_of(create(tmp_path / "b", teacher, keep=(0, 3), depth=None, block_steps=5))[0]
    with one.open() as before, other.open() as after:
        assert all(torch.equal(old, new) for (_, old), (_, new) in zip(before.tensors(), after.tensors()))


@pytest.mark.parametrize("method, sentence", [
    ("greedy", "greedily; removed in this order, with the velocity error after each: 3 ("), ("interleaved", "evenly spread, which took no forward"),
    ("spaced", "greedily, neighbours of a removed block last; removed in this order, with the velocity error after each: 3 ("),
    ("influence", "by influence; removed at once, with 1 - the mean cosine between what each was fed and what it handed on: 3 (0.0000)"),
])
def test_the_report_tells_how_blocks_were_chosen_and_what_that_cost(tmp_path, method, sentence):
    teacher = counting_teacher(depth=6, ffn_dim=64, idle=[3])
    handle, report = result_of(create(tmp_path, teacher, depth=5, method=method))
    assert handle.plan.method == method and sentence in report
    asked, teacher.states = teacher.states, 0
    result_of(create(tmp_path, teacher, depth=None, keep=handle.plan.keep))             # the same but for the choice
    cost = asked - teacher.states
    assert cost == 0 if method == "interleaved" else f"the choice took {cost} forwards of one state each" in report


def test_a_choice_that_came_out_worse_than_interleaved_says_what_was_tried(tmp_path, monkeypatch):
    def worse(teacher, probe, depth):
        yield from ()
        return DepthChoice(keep=(0, 1, 3), error=0.1, interleaved_error=0.1, removals=((1, 0.02),), forwards=48)

    monkeypatch.setattr(build, "least_influence", worse)
    handle, report = result_of(create(tmp_path, method="influence"))
    assert handle.plan.method == "interleaved"
    assert "evenly spread, which came out better than removal by influence; the choice took 48 forwards of one state each" in report


def test_a_refit_starts_nearer_to_the_teacher_and_the_report_says_so(tmp_path, few_states):
    teacher = counting_teacher(depth=6)
    with torch.no_grad():
        teacher.module.blocks[3].cross_attn.o.bias.add_(torch.randn(128))
    teacher.fingerprint = "c0"                                  # of the changed weights
    made = {refit: result_of(create(tmp_path, teacher, keep=(0, 1, 2, 4, 5), depth=None, refit=refit)) for refit in ("none", "mean", "least squares")}
    errors = {refit: handle.card.measured["start_error"] for refit, (handle, _) in made.items()}
    assert errors["mean"] < 0.8 * errors["none"] and errors["least squares"] < 0.8 * errors["none"]
    assert "Refitted" not in made["none"][1]
    assert "in each kept block after a gap (4) the bias of the cross attention" in made["mean"][1]
    assert "in each kept block after a gap (4) the output layer of the cross attention" in made["least squares"][1]
    assert f"states that took no part in the choice: {errors['mean']:.1%}" in made["mean"][1]


def test_where_no_block_follows_a_gap_the_report_says_so(tmp_path):
    cut, refitted = (result_of(create(tmp_path, keep=(0, 1), depth=None, refit=refit)) for refit in ("none", "mean"))
    assert "No kept block comes after a removed one" in refitted[1]
    assert refitted[0].file.read_bytes() == cut[0].file.read_bytes()


def test_blocks_are_trained_from_the_refit_on_and_behind_narrower_ffns_too(tmp_path, few_states):
    def made(**request):
        handle, _ = result_of(create(tmp_path, tiny(depth=5), keep=(0, 1, 3, 4), depth=None, ffn_dim=48, **request))
        with handle.open() as opened:
            return dict(opened.tensors())

    refitted, after, trained = made(refit="mean"), made(refit="mean", block_steps=1), made(block_steps=1)
    bias = "blocks.2.cross_attn.o.bias"
    assert (after[bias] - refitted[bias]).norm() < 0.5 * (after[bias] - trained[bias]).norm()


def test_two_processes_that_make_the_same_start_wait_for_each_other(tmp_path):
    """The second one finds what the first made."""
    starts = tmp_path / "starts"
    first, second = (create(starts, counting_teacher(depth=4), keep=(0, 1, 3), depth=None) for _ in range(2))
    next(first)
    assert next(second).stage.startswith("Waiting")
    made = result_of(first)
    assert result_of(second)[0] == made[0] and [place.name for place in starts.iterdir()] == [made[0].fingerprint]
