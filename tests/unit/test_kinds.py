"""Frozen values refuse what their fields do not say, and an error can be shown whatever it quotes."""
from dataclasses import replace

import pytest

from wanlite_model.compress.plan import CompressionPlan
from wanlite_model.config import MOST, WanConfig
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.errors import LONGEST, WanLiteError

JOB = DistillJob(student="a", teacher="b", prompts="c", shape=(16, 1, 4, 4), shift=3.0)
PLAN = CompressionPlan(keep=(0, 2), ffn_dim=128, method="given", teacher_layers=4, teacher_ffn_dim=256)
WAN = WanConfig(dim=128, ffn_dim=128, num_layers=2)


@pytest.mark.parametrize(("value", "field", "wrong", "told"), [
    (Recipe(), "batch_size", 2.5, "batch_size is 2.5. It must be a whole number."), (Recipe(), "batch_size", True, "batch_size is True"),
    (Recipe(), "learning_rate", float("nan"), "learning_rate is nan. It must be a number."), (Recipe(), "learning_rate", "0.1", "learning_rate is '0.1'"),
    (JOB, "student", 5, "student is 5. It must be text."), (JOB, "shape", (16, 1, 4), "shape is .* It must be 4 of a whole number each."),
    (JOB, "shape", (16, 1, 4, 4.0), "shape is"), (JOB, "sigmas", (1.0, "0"), "sigmas is .* a list of a number each"),
    (JOB, "minutes", 10**400, "minutes is 1000"), (JOB, "fold_guidance", 1, "fold_guidance is 1. It must be true or false."),
    (WAN, "img_emb", "no", "img_emb is 'no'"), (WAN, "num_layers", 10**9, "between 1 and 1000"), (WAN, "dim", 128 * 10**9, f"{MOST['dim']} at the most"),
    (PLAN, "teacher_layers", 3.5, "teacher_layers is 3.5"), (PLAN, "teacher_layers", 2**40, "No WAN has more"),
])
def test_a_value_of_the_wrong_kind_is_refused(value, field, wrong, told):
    with pytest.raises(WanLiteError, match=told):
        replace(value, **{field: wrong})


def test_whole_numbers_are_numbers_and_none_is_where_it_may_be():
    assert replace(JOB, shift=3, sigmas=None) == JOB and replace(Recipe(), learning_rate=0.1).learning_rate == 0.1


def test_an_error_can_be_written_and_read_whatever_it_quotes():
    error = WanLiteError("It says " + "x" * 10_000 + ", which ends.", " a\nb\x00 \ud800 \u202e é 中 ")
    assert len(error.found) < LONGEST and error.found.startswith("It says xx") and error.found.endswith("xx, which ends.")
    assert error.expected == "a\nb\\x00 \\ud800 \\u202e é 中"
    str(error).encode("utf-8")
