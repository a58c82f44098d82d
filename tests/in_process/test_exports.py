"""Every export through the node, opened by its real reader: what was verified, what was not and why, and what is said about it."""
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers_bridge import call, relative, state, tree
from helpers_tiny import random_wan

OLD_WIDGETS = ["student", "name", "format", "dtype", "overwrite"]       # stored by position in every saved workflow


@pytest.fixture
def nodes(pack):
    return pack("nodes.student")


@pytest.fixture(scope="module")
def handle(comfyui, pack):
    """A saved student of three blocks, as Load Student hands it on."""
    folder = comfyui.base / "models/diffusion_models/to export"
    random_wan(seed=4, depth=3, ffn_dim=128).save_pretrained(folder)
    return pack("wanlite_model.compress.handle").StudentHandle.of(folder)


@pytest.fixture
def save(nodes, handle):
    """(file name, report) of the node; every other name is used once."""
    def saved(name, format, dtype, student=handle, overwrite=False, **more):
        return call(nodes.WanLiteSaveStudent, student=student, name=name, format=format, dtype=dtype, overwrite=overwrite, **more)
    return saved


@pytest.fixture
def stock(comfyui, pack):
    """The velocity of a file as the stock loader opens it."""
    def velocity(listed):
        (model,) = comfyui.nodes.UNETLoader().load_unet(listed, "default")
        return pack("nodes.comfy_bridge.teacher").ComfyTeacher(model).velocity(*state())
    return velocity


def own(handle):
    with torch.inference_mode(False), torch.no_grad():
        x, sigma, cond = state()
        return handle.load(torch.float32)(x, 1000 * sigma, cond.context)


def difference(report):
    return float(re.search(r"differs by (\S+) at most", report)[1])


# --- fp8

def test_fp8_opens_in_the_stock_loader_and_tells_what_quantising_changed(save, stock, comfyui):
    listed, report = save("eight", "single file", "fp8")
    plain, _ = save("sixteen", "single file", "bf16")
    assert "verified: ComfyUI's Load Diffusion Model" in report and difference(report) < 1e-4
    told = float(re.search(r"fp8 itself changes the velocity of the bf16 student by ([\d.]+)%", report)[1])
    measured = 100 * float((stock(listed) - stock(plain)).norm() / stock(plain).norm())
    assert 0.5 < told < 10 and measured == pytest.approx(told, rel=0.5)                  # told on another state
    size = {name: (comfyui.base / "models/diffusion_models" / name).stat().st_size for name in (listed, plain)}
    assert size[listed] < 0.85 * size[plain]
    assert "It opens in ComfyUI and WanLite; not in" in report and "it does not know fp8's scales" in report


def test_fp8_with_one_scale_gone_wrong_is_not_saved(save, comfyui, pack, refused, monkeypatch):
    fp8 = pack("wanlite_model.formats.fp8")
    encoded = fp8.encoded
    monkeypatch.setattr(fp8, "encoded", lambda tensors: ((name, tensor * 2 if name == "blocks.1.ffn.0.weight_scale" else tensor)
                                                         for name, tensor in encoded(tensors)))
    before = tree(comfyui.base / "models")
    with refused("its answer differs by .*Nothing was saved"):
        save("wrong scale", "single file", "fp8")
    assert tree(comfyui.base / "models") == before


# --- diffusers

def test_a_diffusers_folder_is_verified_by_diffusers_and_never_listed_by_comfyui(save, handle, comfyui):
    from diffusers import WanTransformer3DModel
    listed = set(comfyui.folder_paths.get_filename_list("diffusion_models"))
    name, report = save("for diffusers", "diffusers folder", "bf16", base_model="Wan 2.1 T2V 1.3B")
    place = comfyui.base / "output/wanlite/diffusers/for diffusers"
    assert name == "for diffusers" and str(place) in report
    assert "verified: diffusers' WanTransformer3DModel.from_pretrained opened it" in report and difference(report) < 1e-4
    assert set(comfyui.folder_paths.get_filename_list("diffusion_models")) == listed
    _, whole = save("for diffusers 32", "diffusers folder", "fp32")
    with torch.inference_mode(False), torch.no_grad():
        x, sigma, cond = state()
        context = torch.nn.functional.pad(cond.context, (0, 0, 0, 512 - cond.context.shape[1]))
        model = WanTransformer3DModel.from_pretrained(str(place) + " 32", torch_dtype=torch.float32).eval()
        assert relative(model(x, 1000 * sigma, context, return_dict=False)[0], own(handle)) < 1e-5
    assert "from Wan 2.1 T2V 1.3B" in (place / "README.md").read_text(encoding="utf-8")


KINDS = {"2.1 I2V": dict(model_type="i2v", in_dim=36, image_dim=1280), "2.1 FLF2V": dict(model_type="flf2v", in_dim=36, image_dim=1280),
         "2.2 I2V": dict(model_type="i2v", in_dim=36), "2.2 TI2V": dict(model_type="ti2v", num_channels=48)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format, dtype, words", [
    ("folder", "bf16", "verified: ComfyUI's Load Diffusion Model"), ("single file", "fp8", "verified: ComfyUI's Load Diffusion Model"),
    ("diffusers folder", "bf16", "verified: diffusers'"), ("GGUF", "Q8_0", "read back")])
def test_every_kind_of_wan_is_verified_with_its_pictures(kind, format, dtype, words, save, comfyui, pack):
    folder = comfyui.base / f"models/diffusion_models/{kind}"
    random_wan(seed=6, depth=2, ffn_dim=128, **KINDS[kind]).save_pretrained(folder, overwrite=True)
    student = pack("wanlite_model.compress.handle").StudentHandle.of(folder)
    x, _, cond = pack("nodes.comfy_bridge.verify").example(student.config)
    assert cond.input(x).shape[1] == student.config.in_dim and (cond.clip_fea is not None) == student.config.img_emb
    _, report = save(f"{kind} {format}", format, dtype, student=student)
    assert words in report and (format == "GGUF" or difference(report) < 1e-4)


@pytest.mark.parametrize("package", ["diffusers", "accelerate"])
def test_without_diffusers_the_folder_is_saved_and_not_called_verified(package, save, pack, comfyui, monkeypatch):
    util = pack("nodes.comfy_bridge.other_readers").importlib.util
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    _, report = save(f"without {package}", "diffusers folder", "bf16")
    assert f"not verified: {package} is not installed here." in report
    assert (comfyui.base / f"output/wanlite/diffusers/without {package}/diffusion_pytorch_model.safetensors").is_file()


def test_what_diffusers_answers_differently_is_not_saved(save, pack, comfyui, refused, monkeypatch):
    """Two names of one shape swapped: diffusers opens that without a complaint."""
    write = pack("wanlite_model.formats.write")
    key_map = write.key_map
    swapped = {"norm_q": "norm_k", "norm_k": "norm_q"}
    monkeypatch.setattr(write, "key_map", lambda *given: {name: re.sub("norm_[qk]", lambda found: swapped[found[0]], other)
                                                          for name, other in key_map(*given).items()})
    before = tree(comfyui.base)
    with refused("diffusers' .* opened the new file, and its answer differs"):
        save("wrong names", "diffusers folder", "fp32")
    assert tree(comfyui.base) == before


# --- GGUF

def test_a_gguf_without_comfyui_gguf_is_read_back_and_said_so(save, comfyui):
    name, report = save("quantised", "GGUF", "Q8_0")
    assert name == "quantised-Q8_0.gguf" and "not verified: read back; not opened, since ComfyUI-GGUF is not installed here." in report
    assert 0.1 < float(re.search(r"Q8_0 itself changes the velocity of the bf16 student by ([\d.]+)%", report)[1]) < 2
    assert "It opens in ComfyUI-GGUF and WanLite; not in" in report and name not in comfyui.folder_paths.get_filename_list("diffusion_models")
    assert (comfyui.base / "output/wanlite/workflows/quantised-Q8_0.workflow.json").is_file()


def test_a_gguf_that_reads_back_wrong_is_not_saved(save, pack, comfyui, refused, monkeypatch):
    gguf_write = pack("wanlite_model.formats.gguf_write")
    packed = gguf_write._packed
    monkeypatch.setattr(gguf_write, "_packed", lambda name, tensor, stored: packed(name, tensor + 1 if name == "head.head.bias" else tensor, stored))
    monkeypatch.setattr(gguf_write, "rounded", lambda kind, name, tensor: tensor)
    before = tree(comfyui.base)
    with refused("reads back differently"):
        save("wrong", "GGUF", "Q4_0")
    assert tree(comfyui.base) == before


def gguf_node(change=0.0):
    """Stands for ComfyUI-GGUF's loader: it asks for the file by name as that does, and opens what the gguf package reads in it."""
    import comfy.sd
    import folder_paths as comfys
    import gguf
    globals()["folder_paths"] = comfys                  # of the module, as there

    def load_unet(self, unet_name, dequant_dtype=None):
        reader = gguf.GGUFReader(folder_paths.get_full_path("unet", unet_name))         # noqa: F821
        tensors = {tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
                   .reshape(tuple(map(int, reversed(tensor.shape)))) for tensor in reader.tensors}
        tensors["head.head.bias"] += change
        return (comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"dtype": torch.float32}),)

    return type("UnetLoaderGGUF", (), {"load_unet": load_unet})


def test_a_gguf_is_opened_by_the_installed_loader_before_it_is_where_that_looks(save, comfyui, refused, monkeypatch):
    monkeypatch.setitem(comfyui.nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF", gguf_node())
    name, report = save("by the node", "GGUF", "Q5_0")
    assert "verified: ComfyUI-GGUF's Unet Loader opened it" in report and difference(report) < 1e-4
    monkeypatch.setitem(comfyui.nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF", gguf_node(change=0.1))
    before = tree(comfyui.base)
    with refused("ComfyUI-GGUF's Unet Loader opened the new file, and its answer differs"):
        save("by a wrong node", "GGUF", "Q5_0")
    assert tree(comfyui.base) == before


@pytest.mark.parametrize("format, dtype", [("folder", "bf16"), ("diffusers folder", "bf16"), ("GGUF", "Q5_0")])
def test_cancel_ends_a_save_and_leaves_nothing(format, dtype, save, comfyui, pack, monkeypatch):
    import comfy.model_management as management
    bridge = pack("nodes.comfy_bridge.save")
    record = bridge.record
    monkeypatch.setattr(bridge, "record", lambda *given: (record(*given), management.interrupt_current_processing())[0])
    before = tree(comfyui.base)
    with pytest.raises(management.InterruptProcessingException):
        save("cancelled", format, dtype)
    assert tree(comfyui.base) == before


# --- LoRA

def test_a_lora_student_saved_whole_is_called_merged_and_is_the_merged_one(save, handle, stock, pack, comfyui):
    lora_of = pack("wanlite_model.formats.lora")
    generator = torch.Generator().manual_seed(2)
    factors = {layer: lora_of.Factors(down=torch.randn(4, 128, generator=generator) * 0.1, up=torch.randn(128, 4, generator=generator), scale=1.0)
               for layer in ("blocks.0.ffn.0", "blocks.2.self_attn.q")}
    file = comfyui.base / "output/an adapter.safetensors"
    lora_of.write_lora(file, lora_of.Lora(factors=factors), dtype=torch.float32)
    student = dataclasses.replace(handle, loras=(str(file),))
    listed, report = save("merged", "folder", "fp32", student=student)
    assert "Its LoRA is merged into these weights." in report
    assert "A LoRA was merged" in (comfyui.base / "models/diffusion_models/merged/README.md").read_text(encoding="utf-8")
    assert relative(stock(listed), own(student)) < 1e-4 and relative(own(student), own(handle)) > 1e-2
    _, alone = save("alone", "LoRA", "bf16", student=student)
    assert "merged" not in alone and "verified: ComfyUI's LoRA loader opened it" in alone and "It opens in ComfyUI, diffusers and WanLite; not in" in alone
    assert "merged" not in save("as it was", "folder", "fp32")[1]
    lora_of.write_lora(file, lora_of.Lora(factors=factors, diffs={"blocks.1.norm3.weight": torch.full((128,), 0.1)}), dtype=torch.float32)
    _, with_a_norm = save("with a norm", "LoRA", "bf16", student=student)
    assert "verified" in with_a_norm and "diffusers (it does not take what this LoRA changes of norms and biases)" in with_a_norm


# --- fp16

def loud(comfyui, pack, factor):
    """A student whose third block's FFN answers so many times louder."""
    module = random_wan(seed=4, depth=3, ffn_dim=128)
    with torch.no_grad():
        module.blocks[2].ffn[2].weight.mul_(factor)
    folder = comfyui.base / f"models/diffusion_models/loud {factor}"
    module.save_pretrained(folder, overwrite=True)
    return pack("wanlite_model.compress.handle").StudentHandle.of(folder)


def test_what_would_overflow_in_fp16_is_warned_of_by_its_block_and_what_would_not_is_told_with_its_margin(save, comfyui, pack):
    _, report = save("ordinary", "folder", "bf16")
    assert "Warning" not in report and re.search(r"its activations reach [\d.,]+ of 65,504", report)
    _, report = save("too loud", "folder", "fp32", student=loud(comfyui, pack, 1e6))
    value = float(re.search(r"Warning: in fp16.*block 2: ffn.2 reaches ([\d,]+) and the limit is 65,504", report)[1].replace(",", ""))
    with torch.inference_mode(False), torch.no_grad():
        recorded = pack("nodes.comfy_bridge.verify").example(loud(comfyui, pack, 1e6).config)
        module, seen = loud(comfyui, pack, 1e6).load(torch.float32), []
        module.blocks[2].ffn[2].register_forward_hook(lambda *given: seen.append(float(given[-1].abs().max())))
        module(recorded[0], 1000 * recorded[1], recorded[2].context)
    assert value == pytest.approx(seen[0], rel=1e-3) and value > 65504


def test_where_comfyui_computes_in_fp16_one_real_forward_is_made_in_it(save, comfyui, pack, monkeypatch):
    import comfy.model_management as management
    monkeypatch.setattr(management, "should_use_fp16", lambda *_, **__: True)
    _, report = save("really half", "single file", "bf16")
    assert 0 < float(re.search(r"One forward in fp16 is finite and changes the velocity by ([\d.]+)%", report)[1]) < 1
    _, report = save("really too loud", "single file", "fp32", student=loud(comfyui, pack, 1e6))
    assert "came out with values that are not finite" in report and "verified" in report


# --- what the node declares, refuses and passes on

def test_widgets_of_older_workflows_keep_their_places(nodes, pack):
    schema, pairs = nodes.WanLiteSaveStudent.GET_SCHEMA(), pack("wanlite_model.formats.pairs")
    assert [widget.id for widget in schema.inputs] == [*OLD_WIDGETS, "base_model", "licence", "picture"]
    assert (tuple(schema.inputs[2].options), tuple(schema.inputs[3].options)) == (pairs.LAYOUTS, pairs.DTYPES)


def test_a_queue_that_could_only_fail_for_want_of_gguf_is_refused(nodes, pack, refused, monkeypatch):
    check = nodes.WanLiteSaveStudent.validate_inputs
    assert check(name="cats", format="GGUF", dtype="Q4_0", base_model="Wan 2.1", licence="Apache-2.0") is True
    util = pack("wanlite_model.formats.gguf_write").importlib
    monkeypatch.setattr(util, "util", SimpleNamespace(find_spec=lambda name: None))
    assert check(format="folder", dtype="bf16") is True
    with refused("pip install gguf"):
        check(format="GGUF", dtype="Q4_0")


def test_the_picture_and_what_is_stated_go_into_a_folders_card_and_a_file_says_that_it_has_none(save, comfyui):
    from PIL import Image
    picture = torch.zeros(2, 4, 6, 3)
    picture[0, ..., 1] = 1.0
    name, report = save("with a picture", "folder", "bf16", base_model="Wan-AI/Wan2.1-T2V-1.3B", licence="Apache-2.0", picture=picture)
    folder = comfyui.base / "models/diffusion_models/with a picture"
    with Image.open(folder / "picture.png") as shown:
        assert shown.size == (6, 4) and shown.getpixel((0, 0)) == (0, 255, 0) and not shown.info
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: Wan-AI/Wan2.1-T2V-1.3B\n") and "![with a picture](picture.png)" in card
    assert str(comfyui.base) not in card and "model card" not in report
    _, report = save("with no picture", "single file", "bf16", licence="Apache-2.0")
    assert "go into a folder's model card; a single file has none" in report
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"] == "WanModel"
