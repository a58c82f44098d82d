"""Create, save, load: what a student's nodes hand on, what the stock loader makes of it, and what they refuse."""
import json
import shutil

import pytest
import torch
from helpers_bridge import call, empty_latent, lora, relative, state, tree
from helpers_predecessor import LAYOUTS, write_predecessor
from helpers_tiny import random_bank


@pytest.fixture
def nodes(pack):
    return pack("nodes.student")


@pytest.fixture
def teacher(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    return ModelSamplingSD3().patch(model, 3.0)[0]


@pytest.fixture
def create(nodes):
    """The student and its report, of half the blocks evenly spread unless told otherwise."""
    def created(model, **given):
        given = {"preset": "1/2 of the blocks", "method": "interleaved", **given}
        return call(nodes.WanLiteCreateStudent, **{"model": model, "prompts": random_bank(2), "latent": empty_latent(96, 96), "depth": 0, "ffn_dim": 0,
                                                   "probe_seed": 0, "block_steps": 0, "keep_map": "", **given})
    return created


def test_a_preset_decides_the_size_and_the_start_is_found_again(comfyui, teacher, create):
    handle, report = create(teacher)
    assert len(handle.plan.keep) == 3 and handle.card.shift == 3.0 and "plain cut" in report
    assert (comfyui.base / "output/wanlite/starts") in __import__("pathlib").Path(handle.folder).parents
    before = tree(comfyui.base)
    assert create(teacher) == (handle, report) and tree(comfyui.base) == before


def test_custom_sizes_and_keep_maps(teacher, create):
    handle, _ = create(teacher, preset="custom", keep_map="0,2-3,5", ffn_dim=64)
    assert handle.plan.keep == (0, 2, 3, 5) and handle.config.ffn_dim == 64
    assert create(teacher, preset="custom", depth=4)[0].config.num_layers == 4


def test_a_lora_becomes_part_of_the_student(comfyui, teacher, create, nodes, comfy_teacher):
    x, sigma, cond = state()
    patched = lora(teacher, 0.7)
    handle, _ = create(patched, preset="same size")
    name, _ = call(nodes.WanLiteSaveStudent, student=handle, name="with-lora", format="single file", dtype="fp32", overwrite=False)
    (stock,) = comfyui.nodes.UNETLoader().load_unet(name, "default")
    velocity = comfy_teacher(stock).velocity(x, sigma, cond)
    assert relative(velocity, comfy_teacher(patched).velocity(x, sigma, cond)) < 1e-4
    assert relative(velocity, comfy_teacher(teacher).velocity(x, sigma, cond)) > 1e-3


def test_notes_on_the_teacher_reach_the_report(teacher, create):
    from comfy_extras.nodes_easycache import EasyCacheNode
    cached = EasyCacheNode.execute(teacher, 0.2, 0.1, 0.9, False).result[0]
    assert "Left out of the teacher: EasyCache" in create(cached)[1]


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_a_saved_student_opens_in_stock_nodes_and_comes_back(layout, comfyui, teacher, create, nodes, comfy_teacher):
    handle, _ = create(teacher)
    name = f"saved {layout}"
    listed, report = call(nodes.WanLiteSaveStudent, student=handle, name=name, format=layout, dtype="bf16", overwrite=False)
    assert "verified" in report
    assert listed in comfyui.folder_paths.get_filename_list("diffusion_models")
    (stock,) = comfyui.nodes.UNETLoader().load_unet(listed, "default")
    back, loaded = call(nodes.WanLiteLoadStudent, name=listed)
    assert loaded.get_model_object("model_sampling").shift == 3.0
    velocity = comfy_teacher(stock).velocity(*state())
    assert relative(comfy_teacher(loaded).velocity(*state()), velocity) < 1e-6
    assert back.plan.keep == handle.plan.keep and back.card == handle.card
    home = comfyui.base / ("models/diffusion_models" if layout == "folder" else "output/wanlite/workflows")
    workflow = next(home.rglob(f"{name}.workflow.json"))
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    values = {node["type"]: node["widgets_values"] for node in graph["nodes"]}
    assert values["UNETLoader"][0].replace("\\", "/") == listed.replace("\\", "/") and values["ModelSamplingSD3"] == [3.0]


def test_saving_says_verified_only_after_the_stock_loader_agreed(teacher, create, pack):
    handle, _ = create(teacher)
    report = pack("nodes.comfy_bridge.save").save(handle, "verified", layout="single file", dtype="fp16", overwrite=False)
    assert report.verified.difference < 1e-4 and "verified: ComfyUI's Load Diffusion Model" in report.sentence


def test_without_memory_for_the_comparison_a_student_is_saved_and_called_not_verified(teacher, create, pack, monkeypatch):
    import comfy.model_management as management
    handle, _ = create(teacher)
    record = pack("nodes.comfy_bridge.verify").record
    needed = 2 * pack("wanlite_model.formats.keymap").wan_size(handle.config)
    monkeypatch.setattr(management, "get_free_memory", lambda device: needed)              # too little by the tenth for the rest
    assert record(handle, "bf16").velocity is None
    report = pack("nodes.comfy_bridge.save").save(handle, "in little memory", layout="single file", dtype="bf16", overwrite=False)
    assert report.file.exists() and report.verified.difference is None
    assert "not verified: one forward of it in fp32" in report.sentence and "GiB are free" in report.sentence
    monkeypatch.setattr(management, "get_free_memory", lambda device: 1.2 * needed)
    assert record(handle, "bf16").velocity is not None


def test_a_file_that_answers_differently_is_not_saved(comfyui, teacher, create, pack, refused, monkeypatch):
    """The weights change between what was meant and what is written, as a fault of the writer would have it."""
    import dataclasses
    save = pack("nodes.comfy_bridge.save")
    handle, other = create(teacher)[0], create(teacher, preset="custom", keep_map="0,1,2")[0]
    monkeypatch.setattr(save, "record", lambda student, dtype: pack("nodes.comfy_bridge.verify").record(other, dtype))
    before = tree(comfyui.base / "models")
    with refused("its answer differs"):
        save.save(dataclasses.replace(handle), "wrong", layout="folder", dtype="fp32", overwrite=False)
    assert tree(comfyui.base / "models") == before


def test_a_taken_name_is_kept_unless_overwrite_is_on(comfyui, teacher, create, nodes, refused):
    handle, _ = create(teacher)
    other, _ = create(teacher, preset="custom", depth=2)
    given = {"name": "taken", "format": "folder", "dtype": "bf16"}
    call(nodes.WanLiteSaveStudent, student=handle, overwrite=False, **given)
    before = tree(comfyui.base)
    with refused("already there"):
        call(nodes.WanLiteSaveStudent, student=other, overwrite=False, **given)
    assert tree(comfyui.base) == before
    call(nodes.WanLiteSaveStudent, student=other, overwrite=True, **given)
    back, _ = call(nodes.WanLiteLoadStudent, name="taken/")
    assert back.config.num_layers == 2


def test_any_wan_file_is_a_student_that_keeps_all_blocks(comfyui, student, nodes, pack):
    from safetensors.torch import save_file
    save_file({name: t.clone() for name, t in student.state_dict().items()}, comfyui.base / "models/diffusion_models/plain.safetensors")
    handle, model = call(nodes.WanLiteLoadStudent, name="plain.safetensors")
    assert handle.plan.keep == tuple(range(6)) and handle.card is None
    assert model.get_model_object("model_sampling").shift == 8.0


def test_a_diffusers_folder_is_a_teacher(comfyui, student, pack, comfy_teacher):
    from safetensors.torch import save_file

    from wanlite_model.formats.keymap import key_map
    folder = comfyui.base / "models/diffusion_models/in diffusers"
    folder.mkdir()
    names = key_map("wan", "diffusers", 6)
    save_file({names[name]: t.clone() for name, t in student.state_dict().items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **student.wan.to_diffusers()}), encoding="utf-8")
    node = pack("nodes.teacher").WanLiteLoadTeacher
    assert "in diffusers/" in pack("nodes.comfy_bridge.folders").model_names()
    model, summary = call(node, name="in diffusers/")
    x, sigma, cond = state()
    with torch.no_grad():
        expected = student(x, 1000 * sigma, cond.context)
    assert relative(comfy_teacher(model).velocity(x, sigma, cond), expected) < 1e-4
    assert "6 blocks of 128" in summary and "shift 8" in summary
    make, given = model.cached_patcher_init         # newer ComfyUIs load a MODEL again by it, for a node that compiles or for a second GPU
    assert relative(comfy_teacher(make(*given)).velocity(x, sigma, cond), expected) < 1e-4


def bad_inputs():
    return {
        "a latent of another model": ({"latent": empty_latent(channels=4)}, "4 channels"),
        "a latent that is no video": ({"latent": {"samples": torch.zeros(1, 16, 8)}}, "not a video"),
        "a keep-map beyond the teacher": ({"preset": "custom", "keep_map": "0-9"}, "0-5"),
        "more blocks than there are": ({"preset": "custom", "depth": 7}, "6 blocks"),
    }


@pytest.mark.parametrize("what", bad_inputs())
def test_wrong_inputs_get_a_sentence_and_change_nothing(what, comfyui, teacher, create, refused):
    given, words = bad_inputs()[what]
    before = tree(comfyui.base)
    with refused(words):
        create(teacher, **given)
    assert tree(comfyui.base) == before


@pytest.mark.parametrize("what, words", [("truncated", "broken.safetensors"), ("text", "broken.safetensors"), ("gap", "is missing"),
                                         ("no wan", "not a WAN")])
def test_a_file_that_is_no_whole_wan_gets_a_sentence(what, words, comfyui, student, pack, refused):
    """ComfyUI itself would fill what is missing with whatever memory holds."""
    from safetensors.torch import save_file
    path = comfyui.base / "models/diffusion_models/broken.safetensors"
    tensors = {name: t.clone() for name, t in student.state_dict().items() if what != "gap" or not name.startswith("blocks.3.ffn")}
    save_file({"conv.weight": torch.zeros(2, 2)} if what == "no wan" else tensors, path)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if what == "text":
        path.write_text("not a model", encoding="utf-8")
    for node in (pack("nodes.teacher").WanLiteLoadTeacher, pack("nodes.student").WanLiteLoadStudent):
        with refused(words):
            call(node, name="broken.safetensors")
    path.unlink()


@pytest.mark.parametrize("written, words", [('{"_class_name": "WanModel", "num_layers": 7', "config.json cannot be read"), ("[]", "holds no fields"),
                                            (None, "says num_layers=7, and its weights have 6"), ("index", "which is not there")])
def test_a_folder_that_contradicts_itself_gets_a_sentence(written, words, comfyui, student, pack, refused):
    """ComfyUI itself reads neither config.json nor the index."""
    folder = student.save_pretrained(comfyui.base / "models/diffusion_models/contradicting").path
    config = folder / "config.json"
    node = pack("nodes.teacher").WanLiteLoadTeacher
    call(node, name="contradicting/")
    if written == "index":
        index = next(folder.glob("*.index.json"))
        index.write_text(index.read_text(encoding="utf-8").replace("diffusion_model.safetensors", "other.safetensors"), encoding="utf-8")
    else:
        wrong = {name: 7 if name in ("num_layers", "depth") else value for name, value in json.loads(config.read_text(encoding="utf-8")).items()}
        config.write_text(written or json.dumps(wrong), encoding="utf-8")
    for one in (node, pack("nodes.student").WanLiteLoadStudent):
        with refused(words):
            call(one, name="contradicting/")
    shutil.rmtree(folder)


def test_a_quantised_file_is_a_teacher(comfyui, student, pack, comfy_teacher):
    from safetensors.torch import save_file
    tensors = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t.clone() for name, t in student.state_dict().items()}
    save_file(tensors, comfyui.base / "models/diffusion_models/fp8.safetensors")
    model, summary = call(pack("nodes.teacher").WanLiteLoadTeacher, name="fp8.safetensors")
    x, sigma, cond = state()
    with torch.no_grad():
        assert relative(comfy_teacher(model).velocity(x, sigma, cond), student(x, 1000 * sigma, cond.context)) < 0.3
    assert "6 blocks of 128" in summary


def test_a_file_that_is_gone_gets_a_sentence(nodes, refused):
    with refused("is not in ComfyUI's model folders"):
        call(nodes.WanLiteLoadStudent, name="gone.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_predecessor_wrote_is_listed_and_read_as_a_recipe(layout, comfyui, nodes, refused):
    name = f"old/{layout}"
    folder = write_predecessor(comfyui.base / "models/diffusion_models" / name, layout)
    names = next(widget for widget in nodes.WanLiteLoadStudent.GET_SCHEMA().inputs if widget.id == "name").options
    assert names.count(f"{name}/") == 1
    before = tree(comfyui.base)
    with refused("(?s)hidden_size=1024 is the width.*16 blocks of 1024 with FFN 4096.*preset=custom, depth=16, ffn_dim=6144"):
        call(nodes.WanLiteLoadStudent, name=f"{name}/")
    assert tree(comfyui.base) == before
    shutil.rmtree(folder)
