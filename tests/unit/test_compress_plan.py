"""Keep-maps and plans: what they are, and what they refuse."""
import json
from itertools import pairwise

import pytest

from wanlite_model.compress.plan import CompressionPlan, format_keep_map, interleaved, parse_keep_map, protected
from wanlite_model.config import WanConfig
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.neurons import from_mask, to_mask


def plan(**changes):
    return CompressionPlan(**{"keep": (0, 1, 3), "ffn_dim": 64, "method": "given", "teacher_layers": 5, "teacher_ffn_dim": 96, **changes})


@pytest.mark.parametrize("layers", [1, 2, 5, 12, 30, 40])
def test_interleaved_spreads_the_kept_blocks_evenly_between_protected_ends(layers):
    for depth in range(1, layers + 1):
        keep, fixed = interleaved(layers, depth), protected(layers, depth)
        assert len(keep) == depth and list(keep) == sorted(set(keep)) and 0 <= keep[0] and keep[-1] < layers
        assert fixed <= set(keep)
        free = [block for block in keep if block not in fixed]
        gaps = [b - a for a, b in pairwise(free)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_keeping_every_block_is_every_block_in_order():
    assert interleaved(7, 7) == tuple(range(7))


@pytest.mark.parametrize("depth, expected", [(20, {0, 1, 28, 29}), (8, {0, 1, 28, 29}), (7, {0, 29}), (2, {0, 29}), (1, set())])
def test_shallow_students_protect_fewer_ends(depth, expected):
    assert protected(30, depth) == expected


@pytest.mark.parametrize("text, keep", [("0-3,5,7-9", (0, 1, 2, 3, 5, 7, 8, 9)), (" 0 , 2 - 4 ", (0, 2, 3, 4)), ("9", (9,)), ("3-3", (3,))])
def test_keep_maps_are_read_and_written(text, keep):
    assert parse_keep_map(text, 10) == keep
    assert parse_keep_map(format_keep_map(keep), 10) == keep


@pytest.mark.parametrize("text, sentence", [
    ("", "has '' in it"), ("0-3,", "has '' in it"), ("0-3;5", "'0-3;5'"), ("-1", "'-1'"), ("0,x", "'x'"), ("1.5", "'1.5'"),
    ("5-3", "runs upwards. Write 3-5"), ("0,10", "block 10. The teacher's 10 blocks are 0-9"), ("0-999999", "block 999999"),
    ("3,3", "block 3 after block 3"), ("4,0-2", "block 0 after block 4"), ("0-4,3-6", "block 3 after block 4"), ("٣", "'٣'"),
])
def test_a_wrong_keep_map_is_one_sentence(text, sentence):
    with pytest.raises(WanLiteError) as error:
        parse_keep_map(text, 10)
    assert sentence in str(error.value)


def test_a_plan_survives_json_and_gives_the_students_architecture():
    assert CompressionPlan.from_json(plan().to_json()) == plan()
    teacher = WanConfig(dim=128, ffn_dim=96, num_layers=5)
    assert plan().student_config(teacher) == WanConfig(dim=128, ffn_dim=64, num_layers=3)
    assert plan().removed == (2, 4) and not plan().prunes_nothing
    assert plan(keep=tuple(range(5)), ffn_dim=96).prunes_nothing


@pytest.mark.parametrize("changes, sentence", [
    ({"keep": ()}, "empty"), ({"keep": (0, 5)}, "block 5"), ({"keep": (1, 0)}, "block 0 after block 1"), ({"keep": (0, True)}, "True"),
    ({"ffn_dim": 97}, "97"), ({"ffn_dim": 0}, "0"), ({"ffn_dim": 64.0}, "64.0"), ({"method": "random"}, "random"),
])
def test_a_plan_the_teacher_cannot_fill_is_refused(changes, sentence):
    with pytest.raises(WanLiteError) as error:
        plan(**changes)
    assert sentence in str(error.value)


def test_which_neurons_were_kept_is_a_bit_each_and_survives_json():
    masks = tuple(to_mask(range(j, j + 64), 96) for j in (0, 1, 32))
    assert [from_mask(mask) for mask in masks] == [tuple(range(j, j + 64)) for j in (0, 1, 32)] and {len(mask) for mask in masks} == {16}
    assert CompressionPlan.from_json(json.loads(json.dumps(plan(ffn_kept=masks).to_json()))) == plan(ffn_kept=masks)


@pytest.mark.parametrize("masks, sentence", [
    ([range(64)] * 2, "does not fit them"), ([range(63)] * 3, "does not fit them"), ([range(64), range(64), range(33, 97)], "does not fit them"),
    (["me@home"] * 3, "cannot be read"), (["A"] * 3, "cannot be read"), ([3] * 3, "must be a list of text"),
])
def test_a_note_of_neurons_that_the_blocks_do_not_have_is_refused(masks, sentence):
    with pytest.raises(WanLiteError, match=sentence):
        plan(ffn_kept=tuple(to_mask(mask, 104) if isinstance(mask, range) else mask for mask in masks))


def test_a_plan_of_another_version_is_refused():
    with pytest.raises(WanLiteError, match="must have keep, ffn_dim"):
        CompressionPlan.from_json({**plan().to_json(), "heads": 3})


@pytest.mark.parametrize("depth", [0, 6, 2.0, True])
def test_a_depth_beyond_the_teacher_is_refused(depth):
    with pytest.raises(WanLiteError, match="The teacher has 5 blocks"):
        interleaved(5, depth)
