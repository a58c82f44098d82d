"""The workflow that comes with a saved student: whole, as ComfyUI's browser writes one."""
from dataclasses import replace

import pytest
from helpers_variants import RELEASED

from wanlite_model import flow
from wanlite_model.config import WanConfig
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.workflow import NEGATIVE, stock_workflow

CONFIG = WanConfig(dim=128, ffn_dim=256, num_layers=2)
ALL = {**{name: (config, {}) for name, config in RELEASED.items()},
       **{f"{name}, one of two": (RELEASED[name], {"expert": "high", "boundary": 0.9}) for name in ("t2v 14B", "i2v 2.2")}}


@pytest.mark.parametrize("frames, output", [(1, "SaveImage"), (33, "SaveAnimatedWEBP")])
@pytest.mark.parametrize("kind", ALL)
def test_every_link_is_known_at_both_its_ends(kind, frames, output):
    config, expert = ALL[kind]
    saved = stock_workflow("cats.safetensors", StudentCard(size=(64, 64, frames), **expert), config)
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert len(nodes) == len(saved["nodes"]) == saved["last_node_id"]
    assert [link[0] for link in saved["links"]] == list(range(1, saved["last_link_id"] + 1))
    for link, origin, origin_slot, target, target_slot, kind in saved["links"]:
        source, goal = nodes[origin]["outputs"][origin_slot], nodes[target]["inputs"][target_slot]
        assert link in source["links"] and goal["link"] == link and source["type"] == goal["type"] == kind
    assert sum(len(output_["links"]) for node in nodes.values() for output_ in node["outputs"]) == len(saved["links"])
    assert [node["type"] for node in nodes.values()][-1] == output


@pytest.mark.parametrize("kind", ALL)
def test_no_two_nodes_overlap(kind):
    config, expert = ALL[kind]
    saved = stock_workflow("cats.safetensors", StudentCard(**expert), config)
    boxes = [(x, y - 30, x + w, y + h) for (x, y), (w, h) in ((node["pos"], node["size"]) for node in saved["nodes"])]      # 30: the title
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_it_carries_the_cards_settings_and_wans_own_negative_prompt():
    card = StudentCard(sampler="lcm", scheduler="beta", steps=6, cfg=1.5, shift=5.0, size=(640, 352, 49))
    values = {node["type"]: node["widgets_values"] for node in stock_workflow("a/b.safetensors", card, CONFIG)["nodes"]}
    assert values["KSampler"] == [0, "randomize", 6, 1.5, "lcm", "beta", 1.0]
    assert values["ModelSamplingSD3"] == [5.0] and values["UNETLoader"] == ["a/b.safetensors", "default"]
    assert values["EmptyHunyuanLatentVideo"] == [640, 352, 49, 1] and values["CLIPTextEncode"] == [NEGATIVE]


@pytest.mark.parametrize(("kind", "latent", "fps", "pictures"), [
    ("t2v 14B", "EmptyHunyuanLatentVideo", 16.0, 0), ("i2v 2.1", "WanImageToVideo", 16.0, 1), ("flf2v", "WanFirstLastFrameToVideo", 16.0, 2),
    ("i2v 2.2", "WanImageToVideo", 16.0, 1), ("ti2v 5B", "Wan22ImageToVideoLatent", 24.0, 1),
])
def test_each_kind_has_its_own_latent_rate_and_pictures(kind, latent, fps, pictures):
    nodes = stock_workflow("cats.safetensors", StudentCard(size=(640, 352, 49)), RELEASED[kind])["nodes"]
    values = {node["type"]: node["widgets_values"] for node in nodes}
    assert values[latent] == [640, 352, 49, 1] and values["SaveAnimatedWEBP"][1] == fps
    kinds = [node["type"] for node in nodes]
    assert kinds.count("LoadImage") == pictures
    assert kinds.count("CLIPVisionEncode") == (pictures if RELEASED[kind].img_emb else 0)


def test_the_5bs_picture_is_off_until_it_is_wanted():
    nodes = stock_workflow("cats.safetensors", StudentCard(), RELEASED["ti2v 5B"])["nodes"]
    assert [node["type"] for node in nodes if node["mode"] == 4] == ["LoadImage"]


def experts(card, kind="t2v 14B", **expert):
    """[(file, shift)] and [values] of the two, the high-noise one first."""
    saved = stock_workflow("student.safetensors", replace(card, **{"expert": "high", "boundary": 0.875, **expert}), RELEASED[kind])
    nodes = {node["id"]: node for node in saved["nodes"]}
    origin = {link[0]: nodes[link[1]] for link in saved["links"]}

    def before(node, name):
        return origin[next(slot["link"] for slot in node["inputs"] if slot["name"] == name)]

    low = before(before(saved["nodes"][-1], "images"), "samples")
    high = before(low, "latent_image")
    assert (low["type"], high["type"]) == ("KSamplerAdvanced",) * 2 and "Sampler" not in before(high, "latent_image")["type"]
    shifts = [before(sampler, "model") for sampler in (high, low)]
    return [(before(shift, "model")["widgets_values"][0], shift["widgets_values"][0]) for shift in shifts], [high["widgets_values"], low["widgets_values"]]


@pytest.mark.parametrize(("kind", "side", "files"), [
    ("t2v 14B", "high", ["student.safetensors", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"]),
    ("i2v 2.2", "low", ["wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "student.safetensors"]),
])
def test_an_expert_is_sampled_together_with_the_other_one_as_released(kind, side, files):
    models, (high, low) = experts(StudentCard(steps=20, cfg=3.5, shift=5.0), kind, expert=side)
    assert models == [(file, 5.0) for file in files]
    at = int((flow.schedule(20, 5.0) >= 0.875).sum())
    assert 0 < at < 20
    assert high == ["enable", 0, "randomize", 20, 3.5, "euler", "simple", 0, at, "enable"]
    assert low == ["disable", 0, "fixed", 20, 3.5, "euler", "simple", at, 10000, "disable"]


@pytest.mark.parametrize(("side", "boundary"), [("high", 0.875), ("low", 0.875), ("high", 0.9999), ("low", 0.0001)])
def test_a_few_step_expert_hands_over_at_a_sigma_that_the_undistilled_one_has_too(side, boundary):
    """Which samples in 20 steps or more with guidance, whatever the student needs; each of the two has something left to do."""
    _, values = experts(StudentCard(sampler="lcm", steps=6, cfg=1.0, shift=12.0), expert=side, boundary=boundary)
    student, released = values if side == "high" else reversed(values)
    assert student[3:7] == [6, 1.0, "lcm", "simple"] and released[3:7] == [24, 3.5, "euler", "simple"]
    (high, low), end = values, 8
    assert 0 < high[end] < high[3] and 0 < low[end - 1] < low[3]
    assert flow.schedule(high[3], 12.0)[high[end]] == flow.schedule(low[3], 12.0)[low[end - 1]]


@pytest.mark.parametrize("change", [{"in_dim": 48, "img_emb": True, "model_type": "i2v"}, {"in_dim": 32}, {"in_dim": 48, "out_dim": 48, "img_emb": True}])
def test_channels_that_no_stock_node_makes_a_latent_for_get_none(change):
    assert stock_workflow("cats.safetensors", StudentCard(), replace(CONFIG, **change)) is None
