"""LoRAs of the teacher on a student, through the node: what stock nodes make of the new files, and what is refused with nothing written."""
import pytest
import torch
from helpers_bridge import call, empty_latent, relative, state, tree
from helpers_tiny import random_bank
from safetensors.torch import load_file, save_file

LAYERS = ("self_attn.q", "cross_attn.v", "ffn.0", "ffn.2")


@pytest.fixture
def loras(comfyui):
    """models/loras, empty but for what a test puts there."""
    folder = comfyui.base / "models/loras"
    folder.mkdir(exist_ok=True)
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()


@pytest.fixture
def remap(pack):
    def remapped(student, lora, **given):
        return call(pack("nodes.lora").WanLiteRemapLoRA, **{"student": student, "lora": lora, "more": "", "suffix": "-wanlite", "overwrite": False, **given})
    return remapped


@pytest.fixture
def saved(model, pack):
    """A student that was created with these settings, saved and loaded again; by its handle and its MODEL."""
    nodes = pack("nodes.student")

    def made(name, **given):
        start, _ = call(nodes.WanLiteCreateStudent, **{"model": model, "prompts": random_bank(2), "latent": empty_latent(96, 96), "preset": "custom",
                                                       "keep_map": "0,2,5", "method": "interleaved", **given})
        call(nodes.WanLiteSaveStudent, student=start, name=name, format="folder", dtype="fp32", overwrite=True)
        return call(nodes.WanLiteLoadStudent, name=f"{name}/")
    return made


def lora_for(model, spelled="diffusion_model.blocks.{block}.{leaf}", blocks=range(6), rank=4):
    generator, file = torch.Generator().manual_seed(1), {}
    for block in blocks:
        for leaf in LAYERS:
            rows, columns = model.model.diffusion_model.get_submodule(f"blocks.{block}.{leaf}").weight.shape
            path = spelled.format(block=block, leaf=leaf)
            path = path.replace(".", "_") if spelled.startswith("lora_unet") else path
            file[f"{path}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
            file[f"{path}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    return file


@pytest.mark.parametrize("spelled", ["diffusion_model.blocks.{block}.{leaf}", "lora_unet__blocks.{block}.{leaf}", "base_model.model.blocks.{block}.{leaf}"])
def test_stock_nodes_make_of_it_what_was_cut_from_the_patched_teacher(spelled, comfyui, model, loras, saved, remap, pack):
    import comfy.sd
    teacher = pack("nodes.comfy_bridge.teacher").ComfyTeacher
    _, student = saved("a third")
    save_file(lora_for(model), loras / "plain.safetensors")
    patched = comfy.sd.load_lora_for_models(model, None, load_file(loras / "plain.safetensors"), 1.0, 0.0)[0]
    x, sigma, cond = state()
    expected = teacher(patched).velocity(x, sigma, cond, skip={1, 3, 4})
    save_file(lora_for(model, spelled), loras / "style.safetensors")
    handle, _ = saved("a third")
    names, report = remap(handle, "style.safetensors")
    assert names == "style-wanlite.safetensors" and "12 of 24 layers of style.safetensors" in report and "gone: blocks 1,3-4" in report
    assert "took all of its 24 tensors, and the student's weights became what was meant (compared in 3 layers)" in report
    assert names in comfyui.folder_paths.get_filename_list("loras")
    (ours, _) = comfyui.nodes.LoraLoader().load_lora(student, None, names, 1.0, 0.0)
    assert relative(teacher(ours).velocity(x, sigma, cond), expected) < 1e-4
    assert relative(teacher(student).velocity(x, sigma, cond), expected) > 1e-2


def test_what_is_linked_makes_it_no_other_node_the_next_time(loras, model, pack):
    """ComfyUI asks whether anything changed without the values of what is linked, and a run of its own leaves new files."""
    node = pack("nodes.lora").WanLiteRemapLoRA
    save_file(lora_for(model), loras / "style.safetensors")
    for linked in ({"more": None, "suffix": "-wanlite"}, {"more": "st*", "suffix": None}):
        before = node.fingerprint_inputs(lora="style.safetensors", **linked)
        save_file(lora_for(model), loras / "style-wanlite.safetensors")
        assert before and node.fingerprint_inputs(lora="style.safetensors", **linked) == before
        (loras / "style-wanlite.safetensors").unlink()


def test_the_kept_neurons_are_found_in_a_saved_student(model, loras, saved, remap):
    handle, _ = saved("narrow", keep_map="", depth=4, ffn_dim=48)
    save_file(lora_for(model), loras / "style.safetensors")
    _, report = remap(handle, "style.safetensors")
    assert "Of 8 FFN changes the part of the 48 kept neurons was taken" in report and "took all of its 32 tensors" in report
    assert load_file(loras / "style-wanlite.safetensors")["diffusion_model.blocks.3.ffn.0.lora_B.weight"].shape == (48, 4)


def test_comfyui_takes_every_kind_of_change_that_is_moved(model, loras, saved, remap):
    handle, _ = saved("a third")
    kinds = {"LoHa": {"hada_w1_a": (128, 2), "hada_w1_b": (2, 128), "hada_w2_a": (128, 2), "hada_w2_b": (2, 128)},
             "LoKr": {"lokr_w1": (8, 8), "lokr_w2": (16, 16)}, "diff": {"diff": (128, 128), "diff_b": (128,)},
             "DoRA": {"lora_A.weight": (2, 128), "lora_B.weight": (128, 2), "dora_scale": (128, 1)}, "OFT": {"oft_blocks": (16, 8, 8), "rescale": (128, 1)},
             "GLoRA": {"a1.weight": (128, 2), "a2.weight": (2, 128), "b1.weight": (128, 2), "b2.weight": (2, 128)},
             "a set weight": {"set_weight": (128, 128)}}
    for kind, parts in kinds.items():
        save_file({f"lycoris_blocks_5_self_attn_q.{part}": torch.randn(shape) for part, shape in parts.items()}, loras / "any.safetensors")
        _, report = remap(handle, "any.safetensors", overwrite=True)
        assert f"took all of its {len(parts)} tensors" in report, kind
        assert ("compared in 1 layer)" in report) == (kind in ("LoHa", "LoKr", "diff")), kind


def test_many_at_once_by_name_and_by_pattern(model, loras, saved, remap, pack):
    handle, _ = saved("a third")
    for name in ("one", "styles/two", "styles/three", "other-wanlite"):
        (loras / name).parent.mkdir(exist_ok=True)
        save_file(lora_for(model), loras / f"{name}.safetensors")
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 2)}, loras / "styles/sdxl.safetensors")
    names, report = remap(handle, "one.safetensors", more="Styles/*\n*\n")
    assert set(names.replace("\\", "/").split("\n")) == {"one-wanlite.safetensors", "styles/two-wanlite.safetensors", "styles/three-wanlite.safetensors"}
    assert report.count("Verified") == 3 and "Left out: sdxl.safetensors is no LoRA for the teacher" in report
    node = pack("nodes.lora").WanLiteRemapLoRA
    given = {"student": None, "lora": "one.safetensors", "more": "styles/*", "suffix": "-wanlite", "overwrite": False}
    before = node.fingerprint_inputs(**given)
    assert before == node.fingerprint_inputs(**given)
    save_file(lora_for(model, rank=5), loras / "styles/two.safetensors")
    assert before != node.fingerprint_inputs(**given)                       # the node runs again when one of its files was changed


def refusals():
    return {
        "a name that is taken": ("style.safetensors", {}, "style-wanlite.safetensors is already there"),
        "what WanLite did not write": ("style.safetensors", {"suffix": "", "overwrite": True}, "WanLite did not write it"),
        "another model's, by its name": ("style.safetensors", {"more": "sdxl.safetensors", "suffix": "-b"}, "sdxl.safetensors is no LoRA for the teacher"),
        "one for a deeper WAN": ("deep.safetensors", {"suffix": "-b"}, "changes block 6.*blocks 0-5"),
        "what was moved already": ("style-wanlite.safetensors", {"suffix": "-b"}, "moved to a student's blocks already"),
        "a file that is gone": ("gone.safetensors", {"suffix": "-b"}, "is not in ComfyUI's LoRA folders"),
    }


@pytest.mark.parametrize("what", refusals())
def test_what_is_refused_changes_nothing(what, comfyui, model, loras, saved, remap, refused):
    lora, given, words = refusals()[what]
    handle, _ = saved("a third")
    save_file(lora_for(model), loras / "style.safetensors")
    remap(handle, "style.safetensors")
    save_file({key.replace("blocks.0.", "blocks.6."): tensor for key, tensor in lora_for(model).items()}, loras / "deep.safetensors")
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 2)}, loras / "sdxl.safetensors")
    before = tree(comfyui.base)
    with refused(words):
        remap(handle, lora, **given)
    assert tree(comfyui.base) == before


def test_a_student_that_keeps_all_needs_no_other_lora(model, loras, saved, remap, refused):
    handle, _ = saved("whole", keep_map="0-5")
    save_file(lora_for(model), loras / "style.safetensors")
    with refused("fit it as they are"):
        remap(handle, "style.safetensors")


@pytest.mark.parametrize("fault, words", [("blocks.1.", "makes something else of"), ("a key", "passes over")])
def test_a_file_that_the_loader_reads_otherwise_is_not_saved(fault, words, comfyui, model, loras, saved, remap, pack, refused, monkeypatch):
    """Written wrongly, as a fault of ours would have it: two blocks' changes change places, or a key is one that no loader knows."""
    engine = pack("wanlite_model.compress.loras")
    stock_key = engine.stock_key

    def wrong(layer, part):
        if fault == "a key":
            return stock_key(layer, part).replace("blocks.2", "block.2")
        return stock_key(layer.replace("blocks.0.", "blocks.9.").replace("blocks.1.", "blocks.0.").replace("blocks.9.", "blocks.1."), part)

    handle, _ = saved("a third")
    save_file(lora_for(model), loras / "style.safetensors")
    monkeypatch.setattr(engine, "stock_key", wrong)
    before = tree(comfyui.base)
    with refused(words):
        remap(handle, "style.safetensors")
    assert tree(comfyui.base) == before


def test_without_memory_to_open_the_student_it_is_saved_and_called_not_verified(model, loras, saved, remap, monkeypatch):
    import comfy.model_management as management
    handle, _ = saved("a third")
    save_file(lora_for(model), loras / "style.safetensors")
    monkeypatch.setattr(management, "get_free_memory", lambda device: 1000)
    names, report = remap(handle, "style.safetensors")
    assert (loras / names).is_file() and "Not verified: the student could not be opened, which takes 0." in report
