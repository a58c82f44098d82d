"""A MODEL in every storage: the student starts from what its weights are, a LoRA laid over them, and answers as the MODEL does."""
import dataclasses

import pytest
import torch
from helpers_bridge import call, empty_latent, lora, lora_change, relative, state
from helpers_storage import E4M3, E5M2, is_linear, open_like_comfyui_gguf, plain, scaled, write_gguf
from helpers_tiny import random_bank, random_wan

from wanlite_model.formats.read import open_wan

@pytest.fixture(scope="module")
def weights():
    """bf16 with norms in fp32, as released files are."""
    return {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in random_wan(seed=3, ffn_dim=256).state_dict().items()}


@pytest.fixture
def models(comfyui):
    """ComfyUI's folder of models, without what a test leaves there."""
    folder = comfyui.base / "models/diffusion_models"
    yield folder
    for path in folder.glob("stored*"):
        path.unlink()


def in_blocks(name, tensor):
    return is_linear(name, tensor) and name.startswith("blocks.")


STORAGES = {
    "bf16": lambda w: plain(w, torch.bfloat16, lambda name, tensor: "norm" not in name),
    "fp16": lambda w: plain(w, torch.float16),
    "float8": lambda w: plain(w, E4M3),
    "float8 in matrices only": lambda w: plain(w, E4M3, is_linear),
    "float8_e5m2": lambda w: plain(w, E5M2, is_linear),
    "scaled_fp8": lambda w: scaled(w, "old"),
    "header": lambda w: scaled(w, "header"),
    "header, some layers": lambda w: scaled(w, "header", chosen=in_blocks),
    "layers": lambda w: scaled(w, "layer"),
    "layers, some": lambda w: scaled(w, "layer", chosen=in_blocks),
}


def opened(pack, models, kept):
    """As WanLite Load Teacher opens it: by ComfyUI's own loader, in a node."""
    kept.save(models / "stored.safetensors")
    return call(pack("nodes.teacher").WanLiteLoadTeacher, name="stored.safetensors")[0]


def in_the_model(kept):
    """What this ComfyUI makes of a file: before 0.8, one that is marked with scaled_fp8 loses its linear layers' biases to float8 too."""
    import comfy.ops
    if "scaled_fp8" in kept.tensors and hasattr(comfy.ops, "scaled_fp8_ops"):
        biases = [name.removesuffix("weight") + "bias" for name in kept.packed]
        return dataclasses.replace(kept, weights={**kept.weights, **{name: kept.weights[name].to(E4M3).float() for name in biases}})
    return kept


def assert_weights(teacher, kept, changes={}):
    """Each is the value computed beside, with the LoRA's change, rounded once to the dtype that it comes in."""
    found = dict(teacher.weights())
    assert found.keys() == kept.weights.keys()
    for name, tensor in found.items():
        assert type(tensor) is torch.Tensor and not tensor.is_inference() and tensor.device.type == "cpu"
        expected = kept.weights[name] + changes.get(name, 0)
        if name in changes:                     # summed in another order by ComfyUI
            assert relative(tensor.float(), expected) < max(1e-6, torch.finfo(tensor.dtype).eps), name
        else:
            assert torch.equal(tensor, expected.to(tensor.dtype)), name
    return found


def assert_answers(teacher, found, tolerance):
    """A student with all blocks, started from these weights, answers as the MODEL does."""
    x, sigma, cond = state()
    student = random_wan(seed=9, ffn_dim=256)
    student.load_state_dict(found)
    with torch.no_grad():
        assert relative(teacher.velocity(x, sigma, cond), student(x, 1000 * sigma, cond.context)) < tolerance


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_are_the_numbers_in_the_file_and_answer_as_the_model_does(storage, weights, models, pack, comfy_teacher):
    kept = STORAGES[storage](weights)
    model = opened(pack, models, kept)
    teacher, kept = comfy_teacher(model), in_the_model(kept)
    found = assert_weights(teacher, kept)
    assert_answers(teacher, found, 1e-5)
    patched = comfy_teacher(lora(model, 0.5))
    for _ in range(2):                          # the second time with the LoRA loaded into the model
        patched.velocity(*state())
        assert_weights(patched, kept, lora_change(model, 0.5))
    assert_weights(teacher, kept)
    assert len({teacher.fingerprint, patched.fingerprint, comfy_teacher(lora(model, 0.6)).fingerprint}) == 3


@pytest.mark.parametrize("storage", STORAGES)
def test_the_file_alone_gives_the_same_numbers_as_the_model(storage, weights, models, pack, comfy_teacher):
    kept = STORAGES[storage](weights)
    teacher, changed = comfy_teacher(opened(pack, models, kept)), in_the_model(kept)
    with open_wan(models / "stored.safetensors") as source:
        for name, tensor in teacher.weights():
            if not torch.equal(kept.weights[name], changed.weights[name]):
                continue                        # the file has more of it than the MODEL
            alone = source.tensor(name)
            assert torch.equal(alone, tensor.to(alone.dtype)), name
            assert relative(alone.float(), tensor.float()) < 2**-8, name


def test_a_file_cast_to_float8_by_the_stock_loader_is_what_it_became(comfyui, weights, models, comfy_teacher):
    plain(weights, torch.float32).save(models / "stored.safetensors")
    with torch.inference_mode():
        model, = comfyui.nodes.UNETLoader().load_unet("stored.safetensors", "fp8_e4m3fn")
    teacher, kept = comfy_teacher(model), plain(weights, E4M3, lambda name, tensor: not name.startswith("patch_embedding."))
    assert_answers(teacher, assert_weights(teacher, kept), 1e-5)
    assert_weights(comfy_teacher(lora(model, 0.5)), kept, lora_change(model, 0.5))


def test_other_scales_are_another_fingerprint(weights, models, pack, comfy_teacher):
    for marking, scale in (("old", "scale_weight"), ("header", "weight_scale")):
        kept, fingerprints = scaled(weights, marking), []
        for factor in (1.0, 1.0, 1.5):
            kept.tensors[f"blocks.1.ffn.0.{scale}"] = kept.tensors[f"blocks.1.ffn.0.{scale}"] * factor
            fingerprints.append(comfy_teacher(opened(pack, models, kept)).fingerprint)
        assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("marking", ["old", "header", "layer"])
def test_a_quantised_file_that_is_not_whole_gets_a_sentence(marking, weights, models, pack, refused):
    """ComfyUI itself would fill what is missing with whatever memory holds."""
    kept = scaled(weights, marking)
    del kept.tensors["blocks.3.ffn.2.bias"]
    with refused("'blocks.3.ffn.2.bias' is missing"):
        opened(pack, models, kept)


def test_quantised_shards_stay_quantised_in_the_model(weights, comfyui, pack, comfy_teacher):
    import json
    import shutil

    from safetensors.torch import save_file
    kept, folder = scaled(weights, "layer"), comfyui.base / "models/diffusion_models/stored in shards"
    folder.mkdir()
    names = list(kept.tensors)
    for i in range(2):
        save_file({name: kept.tensors[name].contiguous().clone() for name in names[i::2]}, folder / f"{i}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(random_wan(ffn_dim=256).wan.to_wan()), encoding="utf-8")
    model, summary = call(pack("nodes.teacher").WanLiteLoadTeacher, name="stored in shards/")
    teacher = comfy_teacher(model)
    assert_answers(teacher, assert_weights(teacher, kept), 1e-5)
    assert "mostly float8_e4m3fn" in summary
    shutil.rmtree(folder)


@pytest.mark.parametrize("storage", ["header, some layers", "Q8_0"])
def test_a_student_is_cut_out_of_the_unpacked_weights(storage, weights, models, pack):
    if storage == "Q8_0":
        kept = write_gguf(models / "stored.gguf", weights, storage)
        model = open_like_comfyui_gguf(models / "stored.gguf")
    else:
        kept = in_the_model(scaled_file := STORAGES[storage](weights))
        model = opened(pack, models, scaled_file)
    student, _ = call(pack("nodes.student").WanLiteCreateStudent, model=lora(model, 0.5), prompts=random_bank(2), latent=empty_latent(32, 32, 1),
                      preset="custom", depth=0, ffn_dim=0, keep_map="0,1,3,5", method="interleaved", block_steps=0, probe_seed=0)
    changes = lora_change(model, 0.5)
    with student.open() as source:
        for old, new in ((0, 0), (1, 1), (3, 2), (5, 3)):
            for name in (name for name in weights if name.startswith(f"blocks.{old}.")):
                expected = kept.weights[name] + changes.get(name, 0)
                start = dict(source.tensors([name.replace(f"blocks.{old}.", f"blocks.{new}.")])).popitem()[1]
                assert relative(start.float(), expected) < 2**-8, name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "BF16", "F16"])
def test_a_gguf_model_is_the_numbers_in_the_file_and_answers_as_the_model_does(kind, weights, models, comfyui, comfy_teacher):
    kept = write_gguf(models / "stored.gguf", weights, kind)
    model = open_like_comfyui_gguf(models / "stored.gguf")
    teacher = comfy_teacher(model)
    found = assert_weights(teacher, kept)
    assert_answers(teacher, found, 1e-5)
    patched = comfy_teacher(lora(model, 0.5))
    assert_weights(patched, kept, lora_change(model, 0.5))
    again = comfy_teacher(open_like_comfyui_gguf(models / "stored.gguf"))
    assert again.fingerprint == teacher.fingerprint and teacher.notes == ()
    assert len({teacher.fingerprint, patched.fingerprint, comfy_teacher(lora(model, 0.6)).fingerprint}) == 3
    assert f"mostly {kind}" in teacher.describe()
    with open_wan(models / "stored.gguf") as source:
        for name, tensor in found.items():
            assert torch.equal(source.tensor(name), tensor.to(source.tensor(name).dtype)), name


def test_a_packed_tensor_of_no_known_kind_is_refused(model, comfy_teacher, refused):
    layer = model.model.diffusion_model.blocks[1].ffn[0]
    layer.weight = torch.nn.Parameter(torch.zeros(64, 128, dtype=torch.uint8), requires_grad=False)
    with refused("blocks.1.ffn.0.weight is packed as Parameter"):
        dict(comfy_teacher(model).weights())


@pytest.mark.parametrize("storage", ["float8", "header", "layers, some"])
def test_a_quantised_file_is_a_student_and_is_saved_unpacked(storage, weights, models, comfyui, pack, comfy_teacher):
    kept, nodes = STORAGES[storage](weights), pack("nodes.student")
    kept.save(models / "stored.safetensors")
    student, model = call(nodes.WanLiteLoadStudent, name="stored.safetensors")
    assert all(torch.equal(tensor, kept.weights[name].bfloat16()) for name, tensor in student.load().state_dict().items())
    assert_weights(comfy_teacher(model), kept)
    name, report = call(nodes.WanLiteSaveStudent, student=student, name="stored-student", format="single file", dtype="bf16", overwrite=True)
    assert "verified" in report
    with open_wan(models / name) as source:
        assert not source.packed and all(torch.equal(tensor, kept.weights[name].bfloat16()) for name, tensor in source.tensors())
