"""What other nodes hang on a MODEL: honoured, left out with a sentence, or refused by name. Never silently used."""
import pytest
import torch
from helpers_bridge import call, relative, state


def assert_left_out(comfy_teacher, plain, patched, words):
    """Told in a note, without a trace in the answer, and still on the MODEL that the graph uses elsewhere."""
    options = repr(patched.model_options)
    teacher = comfy_teacher(patched)
    assert any(words in note for note in teacher.notes), teacher.notes
    again = [teacher.velocity(*state()) for _ in range(2)][-1]
    assert relative(again, comfy_teacher(plain).velocity(*state())) < 1e-6
    assert repr(patched.model_options) == options


def test_a_plain_model_has_no_notes(model, comfy_teacher):
    assert comfy_teacher(model).notes == ()


def test_easycache_is_left_out(model, comfy_teacher):
    from comfy_extras.nodes_easycache import EasyCacheNode
    assert_left_out(comfy_teacher, model, EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).result[0], "EasyCache")


def test_lazycache_is_left_out(model, comfy_teacher):
    from comfy_extras.nodes_easycache import LazyCacheNode
    assert_left_out(comfy_teacher, model, LazyCacheNode.execute(model, 3.0, 0.0, 1.0, False).result[0], "LazyCache")


def test_torch_compile_is_left_out(model, comfy_teacher):
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    assert_left_out(comfy_teacher, model, TorchCompileModel.execute(model, "inductor").result[0], "torch.compile")


def test_a_compiled_block_is_left_out(model, comfy_teacher):
    patched = model.clone()
    patched.add_object_patch("diffusion_model.blocks.0", torch.compile(model.model.diffusion_model.blocks[0]))
    assert_left_out(comfy_teacher, model, patched, "torch.compile")


def test_guidance_of_other_nodes_is_left_out(model, comfy_teacher):
    from comfy_extras.nodes_cfg import CFGZeroStar
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
    assert_left_out(comfy_teacher, model, CFGZeroStar.execute(model).result[0], "post-cfg")
    skipping = SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, double_layers="1, 2").result[0]
    assert_left_out(comfy_teacher, model, skipping, "SLG")
    simple = SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, double_layers="1").result[0]
    assert_left_out(comfy_teacher, model, simple, "simple SLG")


def test_context_windows_are_left_out(model, comfy_teacher):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
    patched = call(WanContextWindowsManualNode, model=model, context_schedule="standard_static", fuse_method="pyramid")[0]
    assert_left_out(comfy_teacher, model, patched, "context windows")


def test_clones_on_other_gpus_are_left_out(model, comfy_teacher):
    """As the node MultiGPU CFG Split of newer ComfyUIs hangs them on a MODEL."""
    patched = model.clone()
    patched.set_additional_models("multigpu", [model.clone()])
    patched.model_options["multigpu_options"] = {}
    patched.add_callback("on_match_multigpu_clones", print)
    assert_left_out(comfy_teacher, model, patched, "MultiGPU CFG Split")
    assert not comfy_teacher(patched).model.additional_models


def test_a_wrapper_around_the_sampler_is_left_out_by_name(model, comfy_teacher):
    patched = model.clone()
    patched.add_wrapper_with_key("predict_noise", "third_party", lambda executor, *args, **kwargs: executor(*args, **kwargs) * 2)
    assert_left_out(comfy_teacher, model, patched, "third_party")


def changes_the_forward():
    """(what a node adds, a word of the sentence): none of it can be in a student's weights."""
    def double(executor, *args, **kwargs):
        return 2 * executor(*args, **kwargs)

    return {
        "an unknown wrapper of the network": (lambda m: m.add_wrapper_with_key("diffusion_model", "tea_cache", double), "tea_cache"),
        "an unknown wrapper of the model": (lambda m: m.add_wrapper_with_key("apply_model", "boost", double), "boost"),
        "an unnamed wrapper": (lambda m: m.add_wrapper("diffusion_model", double), "double"),
        "a function around the model": (lambda m: m.set_model_unet_function_wrapper(double), "model_function_wrapper.*double"),
        "an attention patch": (lambda m: m.set_model_attn1_patch(double), "attn1_patch"),
        "a replaced attention": (lambda m: m.set_model_attn1_replace(double, "double_block", 1), "attn1"),
        "a replaced block": (lambda m: m.set_model_patch_replace(double, "dit", "double_block", 1), "dit"),
        "a replaced forward": (lambda m: m.add_object_patch("diffusion_model.blocks.1.cross_attn.forward", double), "cross_attn.forward"),
        "scaled positions": (lambda m: m.set_model_rope_options(1.0, 0.0, 1.0, 0.0, 2.0, 0.0), "rope_options"),
        "another attention": (lambda m: m.model_options["transformer_options"].update(optimized_attention_override=double),
                              "optimized_attention_override"),
        "a weight wrapper": (lambda m: m.add_weight_wrapper("diffusion_model.blocks.1.ffn.0.weight", double), "ffn.0.weight"),
        "an injection": (lambda m: m.set_injections("bypass", [object()]), "bypass"),
        "a loading callback": (lambda m: m.add_callback("on_load_after", double), "on_load"),
        "an unknown option": (lambda m: m.model_options.update(some_option=1), "some_option"),
    }


@pytest.mark.parametrize("what", changes_the_forward())
def test_what_changes_a_forward_is_refused_by_name(what, model, comfy_teacher, refused):
    add, words = changes_the_forward()[what]
    patched = model.clone()
    add(patched)
    with refused(words):
        comfy_teacher(patched)
    comfy_teacher(model)                                    # the plain MODEL beside it is as good as before


def test_other_models_are_refused_by_name(comfyui, comfy_teacher, refused):
    import comfy.sd
    from helpers_tiny import random_wan
    variants = {"Fun Control": {"model_type": "i2v", "in_dim": 48, "out_dim": 16, "image_dim": 1280},
                "40-channel": {"model_type": "i2v", "in_dim": 40, "out_dim": 16}}
    for words, fields in variants.items():
        wan = random_wan(depth=1, **fields)
        with refused(words):
            comfy_teacher(comfy.sd.load_diffusion_model_state_dict(dict(wan.state_dict())))


def test_a_vace_model_is_refused_by_name(comfyui, comfy_teacher, refused, student):
    import comfy.sd
    file = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    file.update({"vace_patch_embedding.weight": torch.zeros(128, 96, 1, 2, 2), "vace_blocks.0.after_proj.bias": torch.zeros(128)})
    with refused("VACE"):
        comfy_teacher(comfy.sd.load_diffusion_model_state_dict(file))


def test_what_is_no_wan_is_refused(comfyui, comfy_teacher, refused):
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    module = torch.nn.Linear(2, 2)
    cpu = torch.device("cpu")
    with refused("not a WAN"):
        comfy_teacher(comfy.model_patcher.ModelPatcher(module, cpu, cpu))
    other = comfy.model_base.SDXL(comfy.supported_models.SDXL({"disable_unet_model_creation": True, "adm_in_channels": 1}))
    with refused("not a WAN: ComfyUI opened it as SDXL"):
        comfy_teacher(comfy.model_patcher.ModelPatcher(other, cpu, cpu))


def test_another_flow_than_wans_is_refused(model, comfy_teacher, refused):
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow, ModelSamplingContinuousEDM
    with refused("timesteps from 0 to 1000"):
        comfy_teacher(ModelSamplingAuraFlow().patch_aura(model, 3.0)[0])
    with refused("timesteps from 0 to 1000"):
        comfy_teacher(ModelSamplingContinuousEDM().patch(model, "v_prediction", 120.0, 0.002)[0])
