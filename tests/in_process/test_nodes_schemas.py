"""What every node declares: numbers that can be typed, outputs that say what they are, and reports that can be read."""
import asyncio
import logging
import re
from decimal import Decimal

import pytest

NAMES = ["LoadTeacher", "EncodePrompts", "CreateStudent", "Recipe", "Distill", "SaveStudent", "LoadStudent", "Compare", "RemapLoRA"]


@pytest.fixture(scope="module")
def schemas(pack):
    nodes = asyncio.run(pack("nodes").WanLiteExtension().get_node_list())
    return {schema.node_id.removeprefix("WanLite"): schema for schema in (node.GET_SCHEMA() for node in nodes)}


def test_these_are_all_the_nodes(schemas):
    assert list(schemas) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_float_can_be_typed_as_finely_as_it_counts(name, schemas):
    """The browser rounds what is typed to as many decimals as `step` has: default and limits must survive that."""
    for widget in schemas[name].inputs:
        if widget.io_type == "FLOAT":
            decimals = Decimal(str(widget.step))
            assert getattr(widget, "round", None) is None, widget.id
            for value in (widget.default, widget.min, widget.max):
                assert Decimal(str(value)) % decimals == 0, (widget.id, value)


@pytest.mark.parametrize("widget, sensible", [("learning_rate", 3e-7), ("weight_decay", 5e-5), ("ema_decay", 0.99995), ("max_grad_norm", 0.005),
                                              ("save_every", 0.1)])
def test_small_values_of_the_recipe_can_be_typed(widget, sensible, schemas):
    step = next(one.step for one in schemas["Recipe"].inputs if one.id == widget)
    assert Decimal(str(sensible)) % Decimal(str(step)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_everything_on_a_node_says_what_it_is_in_a_few_lines(name, schemas):
    for socket in (*schemas[name].inputs, *schemas[name].outputs):
        assert 10 < len(socket.tooltip or "") <= 260, (socket.id, len(socket.tooltip or ""))


# What each number counts, as its tooltip has to say, and the most that it may be: a slider to a million minutes is none.
UNITS = {"steps": 1_000_000, "minutes": 31 * 24 * 60, "cfg": 30, "GiB": 100_000, "share": 1, "sigma": 1, "blocks": 100, "neurons": 2**16, "rank": 1024,
         "states": 256, "times": 200, "number": 10_000, "seed": 2**31 - 1, "rate": 0.1, "norm": 1000}
COUNTS = {
    "EncodePrompts": {"preview": "number"},
    "CreateStudent": {"block_steps": "steps", "cfg": "cfg", "depth": "blocks", "ffn_dim": "neurons", "probe_seed": "seed"},
    "Recipe": {"rank": "rank", "student_steps": "steps", "own_states": "share", "learning_rate": "rate", "batch_size": "states", "warmup": "steps",
               "max_grad_norm": "norm", "weight_decay": "share", "ema_decay": "share", "teacher_steps": "steps", "renoised": "share", "full_range": "share",
               "evaluations": "times", "save_every": "minutes", "swapped_blocks": "blocks", "boundary": "sigma",
               **dict.fromkeys(("gpu_gib", "ram_gib", "disk_gib", "cache_gib", "runs_gib"), "GiB")},
    "Distill": {"minutes": "minutes", "cfg": "cfg", "steps": "steps", "train_seed": "seed"},
    "Compare": {"clips": "number", "noise_number": "seed", "boundary": "sigma", **{f"{who}_steps": "steps" for who in ("student", "teacher", "third")},
                **{f"{who}_cfg": "cfg" for who in ("student", "teacher", "third")}}}
CHOICE = re.compile(r"\d\S* (to|or) |GiB|sigma|seed|counted from", re.IGNORECASE)        # a range, or a number to choose


@pytest.mark.parametrize("name", NAMES)
def test_every_number_says_what_it_counts_and_what_to_choose_and_ends_where_sense_does(name, schemas):
    numbers = {widget.id: widget for widget in schemas[name].inputs if widget.io_type in ("INT", "FLOAT")}
    assert set(numbers) == set(COUNTS.get(name, ()))
    for key, widget in numbers.items():
        unit = COUNTS[name][key]
        assert re.search(rf"\b{unit}", widget.tooltip, re.IGNORECASE) and CHOICE.search(widget.tooltip), (key, widget.tooltip)
        assert widget.min <= widget.default <= widget.max <= UNITS[unit], key


# What a user decides stands first: the preset, then what is touched each time, then the rest.
FIRST = {"EncodePrompts": ["prompts", "prompt_file", "negative"], "CreateStudent": ["preset", "block_steps", "cfg"],
         "Distill": ["preset", "run_name", "minutes", "cfg"], "SaveStudent": ["name", "format", "dtype"], "Compare": ["clips", "student_steps", "student_cfg"],
         "RemapLoRA": ["lora"], "Recipe": ["objective", "rank"]}


@pytest.mark.parametrize("name", FIRST)
def test_what_a_user_decides_stands_first_and_has_a_default(name, schemas):
    widgets = [widget for widget in schemas[name].inputs if widget.io_type in ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")]
    assert [widget.id for widget in widgets][:len(FIRST[name])] == FIRST[name]
    assert [widget.id for widget in widgets if widget.default is None] == (["lora"] if name == "RemapLoRA" else [])


def test_what_works_for_minutes_can_be_queued_alone(schemas):
    assert [name for name in NAMES if schemas[name].is_output_node] == ["EncodePrompts", "CreateStudent", "Distill", "SaveStudent", "Compare", "RemapLoRA"]


def test_a_report_is_on_the_node_and_in_the_log(pack, caplog):
    with caplog.at_level(logging.INFO):
        shown = pack("nodes.report").told("Distill", "Held-out error 0.1.")
    assert shown.as_dict() == {"text": ("Held-out error 0.1.",)}
    assert "WanLite Distill: Held-out error 0.1." in caplog.text
