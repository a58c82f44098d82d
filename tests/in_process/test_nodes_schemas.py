"""What every node declares: numbers that can be typed, outputs that say what they are, and reports that can be read."""
import asyncio
import logging
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
def test_everything_on_a_node_says_what_it_is(name, schemas):
    for socket in (*schemas[name].inputs, *schemas[name].outputs):
        assert len(socket.tooltip or "") > 10, socket


def test_what_works_for_minutes_can_be_queued_alone(schemas):
    assert [name for name in NAMES if schemas[name].is_output_node] == ["EncodePrompts", "CreateStudent", "Distill", "SaveStudent", "Compare", "RemapLoRA"]


def test_a_report_is_on_the_node_and_in_the_log(pack, caplog):
    with caplog.at_level(logging.INFO):
        shown = pack("nodes.report").told("Distill", "Held-out error 0.1.")
    assert shown.as_dict() == {"text": ("Held-out error 0.1.",)}
    assert "WanLite Distill: Held-out error 0.1." in caplog.text
