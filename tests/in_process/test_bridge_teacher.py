"""A ComfyUI MODEL as a teacher: the same velocity as the stock sampler, LoRA and shift honoured, everything else told or refused."""
import pytest
import torch
from helpers_bridge import lora, relative, state
from helpers_tiny import random_wan

SHIFT = 3.0


def test_velocity_is_the_stock_samplers(model, comfy_teacher):
    import comfy.model_management
    x, sigma, cond = state()
    velocity = comfy_teacher(model).velocity(x, sigma, cond)
    comfy.model_management.load_models_gpu([model])
    context = torch.nn.functional.pad(cond.context, (0, 0, 0, 505))
    with torch.inference_mode():
        x0 = model.model.apply_model(x, sigma, c_crossattn=context, transformer_options={})
    assert relative((x - x0) / sigma.view(-1, 1, 1, 1, 1), velocity) < 1e-5
    assert velocity.dtype == torch.float32


def test_velocity_is_the_students_with_the_same_weights(model, student, comfy_teacher):
    x, sigma, cond = state()
    with torch.no_grad():
        expected = student(x, 1000 * sigma, cond.context)
    assert relative(comfy_teacher(model).velocity(x, sigma, cond), expected) < 1e-5


def test_velocity_changes_with_latent_sigma_and_context(model, comfy_teacher):
    teacher = comfy_teacher(model)
    (x, sigma, cond), (other_x, _, other_cond) = state(), state(seed=5)
    answer = teacher.velocity(x, sigma, cond)
    for changed in ((other_x, sigma, cond), (x, sigma * 0.9, cond), (x, sigma, other_cond)):
        assert relative(teacher.velocity(*changed), answer) > 1e-3


def test_velocity_in_a_node_can_be_trained_on(model, comfy_teacher):
    """Nodes run in inference mode, whose tensors backward refuses."""
    x, sigma, cond = state()
    seen = []
    with torch.inference_mode():
        target = comfy_teacher(model).velocity(x, sigma, cond, taps={"blocks.2": lambda given, answered: seen.append(answered)})
        with torch.inference_mode(False), torch.enable_grad():
            guess = torch.zeros(target.shape, requires_grad=True)
            hidden = torch.zeros(seen[0].shape, requires_grad=True)
            ((guess - target).square().mean() + (hidden * seen[0]).mean()).backward()
    assert guess.grad.abs().sum() > 0 and hidden.grad.abs().sum() > 0


def test_taps_see_what_the_students_blocks_hand_on_and_are_gone_afterwards(model, student, comfy_teacher):
    x, sigma, cond = state()
    seen = {}
    taps = {"blocks.2": lambda given, answered: seen.update(block=answered),
            "blocks.1.ffn.2": lambda given, answered: seen.update(hidden=given)}
    comfy_teacher(model).velocity(x, sigma, cond, taps=taps)
    with torch.no_grad():
        _, features = student(x, 1000 * sigma, cond.context, return_features=[2])
    assert relative(seen["block"], features[2]) < 1e-5
    assert seen["hidden"].shape == (2, 72, 128)
    assert not any(module._forward_hooks for module in model.model.modules())


def test_a_failing_tap_leaves_no_hook_behind(model, comfy_teacher):
    def fail(given, answered):
        raise RuntimeError("tap")
    with pytest.raises(RuntimeError, match="tap"):
        comfy_teacher(model).velocity(*state(), taps={"blocks.0": fail})
    assert not any(module._forward_hooks for module in model.model.modules())


def test_skipped_blocks_are_the_identity(model, student, comfy_teacher):
    x, sigma, cond = state()
    teacher = comfy_teacher(model)
    with torch.no_grad():
        expected = student(x, 1000 * sigma, cond.context, skip_blocks=(1, 4))
    assert relative(teacher.velocity(x, sigma, cond, skip=(1, 4)), expected) < 1e-5
    assert relative(teacher.velocity(x, sigma, cond), expected) > 1e-3


def test_weights_are_the_files_bit_for_bit(model, student, comfy_teacher):
    weights = dict(comfy_teacher(model).weights())
    expected = student.state_dict()
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), name
        assert not weights[name].is_inference()


def test_a_lora_changes_the_velocity_and_is_baked_into_the_weights(model, student, comfy_teacher):
    x, sigma, cond = state()
    teacher = comfy_teacher(lora(model, 0.7))
    velocity = teacher.velocity(x, sigma, cond)
    for _ in range(2):                                      # the second time with the LoRA loaded into the model
        baked = random_wan(seed=9, ffn_dim=128)
        baked.load_state_dict(dict(teacher.weights()))
        with torch.no_grad():
            assert relative(velocity, baked(x, 1000 * sigma, cond.context)) < 1e-5
            assert relative(velocity, student(x, 1000 * sigma, cond.context)) > 1e-3
    assert relative(comfy_teacher(model).velocity(x, sigma, cond), student(x, 1000 * sigma, cond.context).detach()) < 1e-5


def test_an_offloaded_model_answers_the_same(model, comfy_teacher, monkeypatch):
    """As on a GPU that is too small: weights stay where they are and the LoRA is added as each layer runs."""
    import comfy.model_management as management
    x, sigma, cond = state()
    patched = lora(model, 0.7)
    expected = comfy_teacher(patched).velocity(x, sigma, cond)
    management.unload_all_models()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    teacher = comfy_teacher(patched)
    velocity = teacher.velocity(x, sigma, cond)
    assert patched.model.model_lowvram
    assert relative(velocity, expected) < 1e-5
    baked = random_wan(seed=9, ffn_dim=128)
    baked.load_state_dict(dict(teacher.weights()))
    with torch.no_grad():
        assert relative(baked(x, 1000 * sigma, cond.context), expected) < 1e-5
    management.unload_all_models()


def test_fp8_weights_come_back_as_the_forward_uses_them(comfyui, student, comfy_teacher):
    import comfy.sd
    x, sigma, cond = state()
    quantised = comfy.sd.load_diffusion_model_state_dict({name: t.clone() for name, t in student.state_dict().items()},
                                                         model_options={"dtype": torch.float8_e4m3fn})
    teacher = comfy_teacher(quantised)
    assert_baked_weights_answer_like(teacher, x, sigma, cond)


def test_scaled_fp8_weights_come_back_as_the_forward_uses_them(comfyui, student, comfy_teacher):
    import comfy.sd
    x, sigma, cond = state()
    file = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in student.state_dict().items():
        file[name] = tensor.clone()
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            file[name] = (tensor / scale).to(torch.float8_e4m3fn)
            file[name.removesuffix("weight") + "scale_weight"] = scale.clone()
    teacher = comfy_teacher(comfy.sd.load_diffusion_model_state_dict(file))
    assert_baked_weights_answer_like(teacher, x, sigma, cond)
    with torch.no_grad():
        assert relative(teacher.velocity(x, sigma, cond), student(x, 1000 * sigma, cond.context)) < 0.3


def test_layers_with_scales_of_their_own_come_back_as_the_forward_uses_them(comfyui, student, comfy_teacher):
    """The one quantised encoding that every ComfyUI from 0.3.75 on reads; its names are in the file's header."""
    import json

    import comfy.sd
    x, sigma, cond = state()
    file, layers = {}, {}
    for name, tensor in student.state_dict().items():
        file[name] = tensor.clone()
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            file[name] = (tensor / scale).to(torch.float8_e4m3fn)
            file[f"{name}_scale"] = scale.clone()
            layers[name.removesuffix(".weight")] = {"format": "float8_e4m3fn"}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    model = comfy.sd.load_diffusion_model_state_dict(file, metadata=header)
    assert_baked_weights_answer_like(comfy_teacher(model), x, sigma, cond)
    # With a LoRA, ComfyUI quantises the two patched layers again, with random rounding; the student's start is not rounded so.
    patched = comfy_teacher(lora(model, 0.5))
    effect = relative(comfy_teacher(model).velocity(x, sigma, cond), patched.velocity(x, sigma, cond))
    assert_baked_weights_answer_like(patched, x, sigma, cond, tolerance=effect / 4)


def test_the_fingerprint_of_quantised_weights_follows_their_scales(comfyui, student, comfy_teacher):
    import json

    import comfy.sd
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}})}
    fingerprints = set()
    for scale in (0.5, 0.25):
        file = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        file["blocks.0.ffn.0.weight"] = file["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
        file["blocks.0.ffn.0.weight_scale"] = torch.tensor(scale)
        fingerprints.add(comfy_teacher(comfy.sd.load_diffusion_model_state_dict(file, metadata=header)).fingerprint)
    assert len(fingerprints) == 2


def test_weights_of_a_layer_that_scales_its_inputs_hold_the_scale(model, comfy_teacher):
    """Here by hand; newer ComfyUIs do so with some NVFP4 files."""
    layer, scale = model.model.diffusion_model.blocks[1].ffn[0], torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.5
    layer.register_parameter("pre_quant_scale", torch.nn.Parameter(scale, requires_grad=False))
    forward = layer.forward
    layer.forward = lambda x, *rest, **named: forward(x * scale, *rest, **named)
    assert_baked_weights_answer_like(comfy_teacher(model), *state())


def assert_baked_weights_answer_like(teacher, x, sigma, cond, tolerance=1e-5):
    velocity = teacher.velocity(x, sigma, cond)
    baked = random_wan(seed=9, ffn_dim=128)
    baked.load_state_dict({name: tensor.float() for name, tensor in teacher.weights()})
    with torch.no_grad():
        assert relative(baked(x, 1000 * sigma, cond.context), velocity) < tolerance


def test_the_fingerprint_follows_weights_and_lora_and_nothing_else(model, comfyui, student, comfy_teacher):
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    plain = comfy_teacher(model)
    again = comfy.sd.load_diffusion_model_state_dict({name: t.clone() for name, t in student.state_dict().items()},
                                                     model_options={"dtype": torch.float32})
    before = comfy_teacher(lora(model, 0.5)).fingerprint
    loaded = comfy_teacher(lora(model, 0.5))
    loaded.velocity(*state())
    assert comfy_teacher(again).fingerprint == plain.fingerprint
    assert loaded.fingerprint == before                     # a LoRA loaded into the model, or not yet
    assert comfy_teacher(ModelSamplingSD3().patch(model, 5.0)[0]).fingerprint == plain.fingerprint      # how it is sampled is not what it is
    others = [lora(model, 0.6), lora(model, 0.5, seed=2)]
    fingerprints = {plain.fingerprint, before, *(comfy_teacher(other).fingerprint for other in others)}
    assert len(fingerprints) == 4


def test_the_fingerprint_is_the_same_in_another_process(model, comfy_teacher, comfyui_folder, tmp_path, student):
    import subprocess
    import sys

    from demo.comfy_path import ROOT
    from safetensors.torch import save_file
    save_file({name: t.clone() for name, t in student.state_dict().items()}, tmp_path / "wan.safetensors")
    code = """
import sys
from pathlib import Path
from demo.comfy_path import import_pack, put_comfyui_first
put_comfyui_first(Path(sys.argv[1]))
import comfy.cli_args
comfy.cli_args.args.cpu = True
import importlib, torch, comfy.sd
sys.path.append("tests")
bridge = importlib.import_module(import_pack().__name__ + ".nodes.comfy_bridge.teacher")
from helpers_bridge import lora
model = comfy.sd.load_diffusion_model(sys.argv[2], model_options={"dtype": torch.float32})
print(bridge.ComfyTeacher(lora(model, 0.5)).fingerprint)
"""
    run = subprocess.run([sys.executable, "-c", code, str(comfyui_folder), str(tmp_path / "wan.safetensors")], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.stdout.strip() == comfy_teacher(lora(model, 0.5)).fingerprint, run.stderr


def test_the_shift_is_the_models_own(model, comfy_teacher):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    assert comfy_teacher(model).shift == 8.0
    assert comfy_teacher(ModelSamplingSD3().patch(model, SHIFT)[0]).shift == SHIFT


def test_a_lora_on_modulation_is_told_and_not_baked_because_comfyui_never_applies_it(model, student, comfy_teacher):
    x, sigma, cond = state()
    patched = model.clone()
    patched.add_patches({"diffusion_model.blocks.0.modulation": ("diff", (torch.ones(1, 6, 128),))}, 1.0)
    teacher = comfy_teacher(patched)
    assert any("blocks.0.modulation" in note for note in teacher.notes)
    assert torch.equal(dict(teacher.weights())["blocks.0.modulation"], student.blocks[0].modulation)
    assert relative(teacher.velocity(x, sigma, cond), comfy_teacher(model).velocity(x, sigma, cond)) < 1e-6
