"""The table of tensors against the models themselves, built on the meta device where the real sizes cost nothing."""
import pytest
import torch
from helpers_wan_video import wan_video

from wanlite_model.config import WanConfig
from wanlite_model.formats.keymap import ALL_ROWS, IMAGE_ROWS, ROWS, key_map, rows_of, to_wan_names, wan_shapes
from wanlite_model.transformer import WanLiteStudent

T2V_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_layers=30)
A14B = WanConfig(dim=5120, ffn_dim=13824, num_layers=40)
I2V = WanConfig(model_type="i2v", dim=256, ffn_dim=300, num_layers=2, in_dim=36, img_emb=True)
FLF2V = WanConfig(model_type="flf2v", dim=256, ffn_dim=300, num_layers=2, in_dim=36, img_emb=True)
TI2V = WanConfig(model_type="ti2v", dim=256, ffn_dim=300, num_layers=2, in_dim=48, out_dim=48)


def test_the_released_sizes():
    """825 and 1095 tensors, 1.419 and 14.29 billion numbers: the published checkpoints of 2.1 T2V-1.3B and of an A14B expert."""
    for config, tensors, numbers in ((T2V_1_3B, 825, 1.419e9), (A14B, 1095, 14.29e9)):
        shapes = wan_shapes(config)
        assert len(shapes) == tensors
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(numbers, rel=1e-3)


@pytest.mark.parametrize("config", [T2V_1_3B, I2V, FLF2V, TI2V], ids=lambda config: config.model_type)
def test_the_table_is_our_student_tensor_for_tensor(config):
    student = WanLiteStudent.from_wan(config, device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()} == wan_shapes(config)


@pytest.mark.parametrize("config", [T2V_1_3B, I2V, FLF2V, TI2V], ids=lambda config: config.model_type)
def test_the_table_is_diffusers_model_tensor_for_tensor(config):
    from diffusers import WanTransformer3DModel
    with torch.device("meta"):
        model = WanTransformer3DModel(**config.to_diffusers())
    shapes, names = wan_shapes(config), key_map("wan", "diffusers", config.num_layers, rows_of(config))
    assert {names[name]: shape for name, shape in shapes.items()} == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("rows", [ROWS, IMAGE_ROWS, ALL_ROWS])
def test_the_map_is_one_to_one(rows):
    there, back = key_map("wan", "diffusers", 3, rows), key_map("diffusers", "wan", 3, rows)
    assert {new: old for old, new in there.items()} == back
    assert len(back) == len(there)


def test_the_norm_before_cross_attention_changes_its_number():
    assert key_map("wan", "diffusers", 1)["blocks.0.norm3.weight"] == "blocks.0.norm2.weight"


def test_an_unknown_name_is_kept_for_the_reader_to_report():
    names = to_wan_names(["proj_out.weight", "blocks.1.attn1.to_q.bias", "blocks.1.motion.weight"])
    assert names == {"proj_out.weight": "head.head.weight", "blocks.1.attn1.to_q.bias": "blocks.1.self_attn.q.bias",
                     "blocks.1.motion.weight": "blocks.1.motion.weight"}


def test_the_table_is_wan_videos_model_tensor_for_tensor():
    for config in (T2V_1_3B, TI2V):
        with torch.device("meta"):
            model = wan_video().WanModel(**{key: value for key, value in config.to_wan().items() if key != "_class_name"})
        assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == wan_shapes(config)
