"""LoRA files: every spelling that circulates says the same, ours is read back, and another model's is refused in a sentence."""
import pytest
import torch
from helpers_tiny import random_wan
from safetensors.torch import load_file, save_file

from wanlite_model.errors import WanLiteError
from wanlite_model.formats.lora import Factors, Lora, read_lora, stacked, write_lora

WAN = random_wan(depth=2)
LAYER = "blocks.1.cross_attn.q"
DOWN, UP = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)), torch.randn(128, 3, generator=torch.Generator().manual_seed(1))

SPELLINGS = {
    "stock": f"diffusion_model.{LAYER}.lora_A.weight diffusion_model.{LAYER}.lora_B.weight",
    "down and up": f"diffusion_model.{LAYER}.lora_down.weight diffusion_model.{LAYER}.lora_up.weight",
    "kohya": "lora_unet_blocks_1_cross_attn_q.lora_down.weight lora_unet_blocks_1_cross_attn_q.lora_up.weight",
    "diffusers": "transformer.blocks.1.attn2.to_q.lora_A.weight transformer.blocks.1.attn2.to_q.lora_B.weight",
    "peft": f"base_model.model.{LAYER}.lora_A.default.weight base_model.model.{LAYER}.lora_B.default.weight",
    "bare": f"{LAYER}.lora_A.weight {LAYER}.lora_B.weight",
}


@pytest.mark.parametrize("how", SPELLINGS)
def test_every_spelling_says_the_same(tmp_path, how):
    down, up = SPELLINGS[how].split()
    save_file({down: DOWN, up: UP}, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors", WAN.wan)
    assert set(found.factors) == {LAYER}
    torch.testing.assert_close(found.factors[LAYER].delta(), UP @ DOWN)


def test_alpha_is_a_share_of_the_rank_and_whole_differences_are_added(tmp_path):
    save_file({"diffusion_model.blocks.0.ffn.2.lora_A.weight": torch.ones(4, WAN.wan.ffn_dim), "diffusion_model.blocks.0.ffn.2.lora_B.weight": torch.ones(128, 4),
               "diffusion_model.blocks.0.ffn.2.alpha": torch.tensor(2.0), "diffusion_model.blocks.0.norm3.diff": torch.full((128,), 0.5),
               "diffusion_model.blocks.0.ffn.2.diff_b": torch.full((128,), 0.25)}, tmp_path / "a.safetensors")
    base = {name: tensor.detach() for name, tensor in WAN.state_dict().items()}
    merged = dict(read_lora(tmp_path / "a.safetensors", WAN.wan).merged(base.items()))
    change = {name: merged[name] - base[name] for name in base if not torch.equal(merged[name], base[name])}
    assert set(change) == {"blocks.0.ffn.2.weight", "blocks.0.norm3.weight", "blocks.0.ffn.2.bias"}
    torch.testing.assert_close(change["blocks.0.ffn.2.weight"], torch.full_like(base["blocks.0.ffn.2.weight"], 2.0))      # 4 ones at alpha 2 of rank 4
    torch.testing.assert_close(change["blocks.0.norm3.weight"], torch.full((128,), 0.5))
    torch.testing.assert_close(change["blocks.0.ffn.2.bias"], torch.full((128,), 0.25))


def test_what_is_written_is_read_back(tmp_path):
    lora = Lora(factors={LAYER: Factors(down=DOWN.bfloat16(), up=UP.bfloat16(), scale=0.5)}, diffs={"blocks.0.norm3.bias": torch.ones(128)})
    size = write_lora(tmp_path / "a.safetensors", lora)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    keys = set(load_file(tmp_path / "a.safetensors"))
    assert keys == {f"diffusion_model.{LAYER}.lora_A.weight", f"diffusion_model.{LAYER}.lora_B.weight", f"diffusion_model.{LAYER}.alpha",
                    "diffusion_model.blocks.0.norm3.diff_b"}
    found = read_lora(tmp_path / "a.safetensors", WAN.wan)
    torch.testing.assert_close(found.factors[LAYER].delta(), lora.factors[LAYER].delta())
    assert torch.equal(found.diffs["blocks.0.norm3.bias"].float(), torch.ones(128))


def test_changes_of_modulation_are_left_out_as_comfyui_leaves_them_out(tmp_path, caplog):
    factors = {f"diffusion_model.{LAYER}.lora_A.weight": DOWN, f"diffusion_model.{LAYER}.lora_B.weight": UP}
    modulation = {"diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 128), "diffusion_model.blocks.1.modulation.diff": torch.ones(1, 6, 128),
                  "diffusion_model.head.diff_m": torch.ones(1, 2, 128)}
    save_file({**factors, **modulation}, tmp_path / "a.safetensors")
    with caplog.at_level("INFO"):
        found = read_lora(tmp_path / "a.safetensors", WAN.wan)
    assert set(found.factors) == {LAYER} and not found.diffs and "and 2 more, which ComfyUI does not apply" in caplog.text
    save_file({**factors, "diffusion_model.blocks.7.diff_m": torch.ones(1, 6, 128)}, tmp_path / "b.safetensors")
    with pytest.raises(WanLiteError, match="no LoRA for a WAN of 2 blocks"):
        read_lora(tmp_path / "b.safetensors", WAN.wan)


def test_stacked_loras_add_what_each_adds():
    loras = [Lora(factors={LAYER: Factors(down=DOWN * k, up=UP, scale=0.5)}, diffs={"blocks.0.norm3.bias": torch.full((128,), k)}) for k in (1.0, 3.0)]
    one = stacked([*loras, Lora(factors={"blocks.0.ffn.0": Factors(down=DOWN, up=torch.ones(WAN.wan.ffn_dim, 3), scale=1.0)})])
    torch.testing.assert_close(one.factors[LAYER].delta(), 0.5 * (UP @ DOWN) * 4)
    assert set(one.factors) == {LAYER, "blocks.0.ffn.0"} and torch.equal(one.diffs["blocks.0.norm3.bias"], torch.full((128,), 4.0))


@pytest.mark.parametrize("tensors, words", [
    ({"diffusion_model.blocks.7.ffn.0.lora_A.weight": DOWN, "diffusion_model.blocks.7.ffn.0.lora_B.weight": UP}, "no LoRA for a WAN of 2 blocks"),
    ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(3, 64), "diffusion_model.blocks.0.self_attn.q.lora_B.weight": UP}, "changes blocks.0.self_attn.q"),
    ({f"diffusion_model.{LAYER}.lora_A.weight": DOWN}, "only a part"),
    ({"lora_te1_text_model.lora_down.weight": DOWN}, "no LoRA for a WAN"),
    ({}, "no LoRA for a WAN"),
    ({f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP, f"transformer.{LAYER}.lora_down.weight": DOWN * 2}, "twice, under two names"),
    ({f"{LAYER}.diff_b": torch.ones(128), f"transformer.{LAYER}.diff_b": torch.ones(128)}, "twice, under two names"),
    ({f"{LAYER}.lora_A.weight": DOWN[:0], f"{LAYER}.lora_B.weight": UP[:, :0]}, "changes blocks.1.cross_attn.q by"),
    ({f"{LAYER}.lora_A.weight": DOWN.to(torch.complex64), f"{LAYER}.lora_B.weight": UP}, "by complex64 values"),
    ({f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP, f"{LAYER}.alpha": torch.ones(3)}, "an alpha .* that is no number"),
    ({f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP, f"{LAYER}.alpha": torch.tensor(float("nan"))}, "an alpha .* that is no number"),
])
def test_other_loras_are_refused_in_a_sentence(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(WanLiteError, match=words):
        read_lora(tmp_path / "a.safetensors", WAN.wan)
