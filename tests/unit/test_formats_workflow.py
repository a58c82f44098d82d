"""The workflow that comes with a saved student: whole, as ComfyUI's browser writes one."""
from dataclasses import replace

import pytest

from wanlite_model.config import WanConfig
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.workflow import NEGATIVE, stock_workflow

CONFIG = WanConfig(dim=128, ffn_dim=256, num_layers=2)


@pytest.mark.parametrize("frames, output", [(1, "SaveImage"), (33, "SaveAnimatedWEBP")])
def test_every_link_is_known_at_both_its_ends(frames, output):
    saved = stock_workflow("cats.safetensors", StudentCard(size=(64, 64, frames)), CONFIG)
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert len(nodes) == len(saved["nodes"]) == saved["last_node_id"]
    assert [link[0] for link in saved["links"]] == list(range(1, saved["last_link_id"] + 1))
    for link, origin, origin_slot, target, target_slot, kind in saved["links"]:
        source, goal = nodes[origin]["outputs"][origin_slot], nodes[target]["inputs"][target_slot]
        assert link in source["links"] and goal["link"] == link and source["type"] == goal["type"] == kind
    assert sum(len(output_["links"]) for node in nodes.values() for output_ in node["outputs"]) == len(saved["links"])
    assert [node["type"] for node in nodes.values()][-1] == output


def test_no_two_nodes_overlap():
    saved = stock_workflow("cats.safetensors", StudentCard(), CONFIG)
    boxes = [(x, y - 30, x + w, y + h) for (x, y), (w, h) in ((node["pos"], node["size"]) for node in saved["nodes"])]      # 30: the title
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_it_carries_the_cards_settings_and_wans_own_negative_prompt():
    card = StudentCard(sampler="lcm", scheduler="beta", steps=6, cfg=1.5, shift=5.0, size=(640, 352, 49))
    values = {node["type"]: node["widgets_values"] for node in stock_workflow("a/b.safetensors", card, CONFIG)["nodes"]}
    assert values["KSampler"] == [0, "randomize", 6, 1.5, "lcm", "beta", 1.0]
    assert values["ModelSamplingSD3"] == [5.0] and values["UNETLoader"] == ["a/b.safetensors", "default"]
    assert values["EmptyHunyuanLatentVideo"] == [640, 352, 49, 1] and values["CLIPTextEncode"] == [NEGATIVE]


@pytest.mark.parametrize("change", [{"in_dim": 36, "model_type": "i2v"}, {"in_dim": 48, "out_dim": 48, "model_type": "ti2v"}])
def test_kinds_that_need_other_inputs_get_none(change):
    assert stock_workflow("cats.safetensors", StudentCard(), replace(CONFIG, **change)) is None
