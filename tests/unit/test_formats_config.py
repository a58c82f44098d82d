"""One architecture in three vocabularies: what goes out comes back, and what disagrees is refused in a sentence."""
import pytest
from helpers_variants import RELEASED

from wanlite_model.config import NAMES, WANLITE_FIELDS, WanConfig
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.keymap import wan_shapes

CONFIGS = {**RELEASED, "a student": WanConfig(dim=256, ffn_dim=301, num_layers=1)}
# Wan-Video's released config.json of 2.1 T2V-1.3B, and diffusers' of the same model.
RELEASED_WAN = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256,
                "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16, "text_len": 512}
RELEASED_DIFFUSERS = {"_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": 128, "cross_attn_norm": True,
                      "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256, "image_dim": None, "in_channels": 16, "num_attention_heads": 12,
                      "num_layers": 30, "out_channels": 16, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads",
                      "rope_max_seq_len": 1024, "text_dim": 4096}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name):
    config = CONFIGS[name]
    assert WanConfig.from_dict(config.to_json()) == config
    assert WanConfig.from_dict(config.to_diffusers()) == config
    assert WanConfig.from_dict(config.to_wanlite()) == config
    assert WanConfig.from_shapes(wan_shapes(config)) == config


@pytest.mark.parametrize("name", set(CONFIGS) - {"i2v 2.2"})
def test_wan_videos_own_words_are_read_back(name):
    """Without 2.2's I2V: its config.json is the same as 2.1's, and only the weights tell them apart."""
    assert WanConfig.from_dict(CONFIGS[name].to_wan()) == CONFIGS[name]
    assert CONFIGS["i2v 2.2"].to_wan() == CONFIGS["i2v 2.1"].to_wan()


@pytest.mark.parametrize("released", [RELEASED_WAN, RELEASED_DIFFUSERS])
def test_released_configs_are_the_1_3b(released):
    assert WanConfig.from_dict(released) == CONFIGS["t2v 1.3B"]


def test_the_written_config_has_the_names_of_all_three_readers():
    written = CONFIGS["t2v 1.3B"].to_json()
    assert {**RELEASED_WAN, **written} == {**written, "_diffusers_version": "0.30.0"}
    ours = {key: value for key, value in RELEASED_DIFFUSERS.items() if key in written and not key.startswith("_")}
    assert {key: written[key] for key in ours} == ours
    assert "qk_norm" not in written             # its values differ between Wan-Video (True) and diffusers (a word)
    assert set(WANLITE_FIELDS) - {"image_size"} <= set(written)         # image_size belongs to the student, not to the WAN


def test_a_predecessors_ten_fields_name_a_wan():
    fields = {"model_type": "WanLiteStudent", "hidden_size": 1024, "depth": 16, "num_heads": 8, "num_channels": 16}
    assert WanConfig.from_dict(fields) == WanConfig(dim=1024, ffn_dim=4096, num_layers=16)


@pytest.mark.parametrize("key", [key for key, names in NAMES.items() if len({name for name in names if name}) > 1])
def test_two_names_of_one_number_that_disagree_are_refused(key):
    written = CONFIGS["t2v 1.3B"].to_json()
    for name in {name for name in NAMES[key] if name}:
        with pytest.raises(WanLiteError, match="contradicts itself"):
            WanConfig.from_dict({**written, name: 2 * written[name]})


@pytest.mark.parametrize("change, told", [
    ({"attention_head_dim": 64}, "hidden_size=1536 and num_attention_heads . attention_head_dim=768"),
    ({"num_channels": 48}, "out_dim=16 and num_channels=48"),
    ({"dim": [1536]}, "contradicts itself"),
    ({"dim": "1536"}, "contradicts itself"),
    ({"num_layers": 0, "depth": 0}, "num_layers is 0"),
    ({"ffn_dim": 8960.5}, "ffn_dim is 8960.5"),
    ({"num_layers": True, "depth": True}, "num_layers is True"),
    ({"text_len": 77, "text_max_length": 77}, "text_max_length=77.*has 512"),
    ({"text_dim": 1024, "text_encoder_output_dim": 1024}, "text_encoder_output_dim=1024.*has 4096"),
    ({"freq_dim": 128}, "freq_dim=128.*has 256"),
    ({"eps": 1e-5}, "eps=1e-05.*has 1e-06"),
    ({"patch_size": 16}, "patch_size=16"),
    ({"patch_size": [1, 1, 1]}, "patch_size="),
    ({"model_type": "vace"}, "model_type is 'vace'"),
])
def test_a_value_no_wan_has_is_refused(change, told):
    with pytest.raises(WanLiteError, match=told):
        WanConfig.from_dict({**CONFIGS["t2v 1.3B"].to_json(), **change})


def test_num_heads_16_at_1024_is_refused_and_says_8():
    with pytest.raises(WanLiteError, match="num_heads=16.*has 8"):
        WanConfig.from_dict({"hidden_size": 1024, "depth": 2, "num_heads": 16})


@pytest.mark.parametrize("width, near", [(1000, "896 or 1024"), (0, "128 or 256"), (-5, "128 or 256"), (float("nan"), "128 or 256"),
                                         (float("inf"), "128 or 256"), ("wide", "128 or 256"), (True, "128 or 256")])
def test_a_width_comfyui_cannot_split_into_heads_is_refused_with_the_nearest(width, near):
    with pytest.raises(WanLiteError, match=near):
        WanConfig.from_dict({"hidden_size": width, "depth": 2})


@pytest.mark.parametrize("fields, told", [({}, "no hidden_size and no depth"), ({"dim": 256}, "no depth"), ({"num_layers": 2}, "no hidden_size")])
def test_a_config_without_width_or_depth_is_refused(fields, told):
    with pytest.raises(WanLiteError, match=told):
        WanConfig.from_dict(fields)


@pytest.mark.parametrize("name, shape", [("head.modulation", None), ("head.modulation", ()), ("patch_embedding.weight", (256, 16)),
                                         ("blocks.0.ffn.0.weight", None), ("head.head.weight", (64,))])
def test_shapes_that_cannot_tell_the_architecture_are_refused(name, shape):
    shapes = {**wan_shapes(CONFIGS["a student"]), name: shape}
    if shape is None:
        del shapes[name]
    with pytest.raises(WanLiteError, match=name):
        WanConfig.from_shapes(shapes)


def test_another_depth_and_ffn_width_leave_the_rest():
    config = CONFIGS["i2v 2.1"].resized(num_layers=20, ffn_dim=8192)
    assert (config.num_layers, config.ffn_dim, config.dim, config.in_dim, config.img_emb) == (20, 8192, 5120, 36, True)
