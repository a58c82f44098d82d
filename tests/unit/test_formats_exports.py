"""Exports beyond the plain folder: fp8 and GGUF as their readers expect them, diffusers' folder, the model card, and who opens what."""
import errno
import json
import os
import re
import sys
from dataclasses import replace

import gguf
import pytest
import torch
from helpers_tiny import random_wan
from safetensors import safe_open

from wanlite_model.config import WanConfig
from wanlite_model.errors import WanLiteError
from wanlite_model.formats import fp8, gguf_write
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.gguf_write import read_back, stored_as, write_gguf
from wanlite_model.formats.model_card import Stated, model_card
from wanlite_model.formats.pairs import ALLOWED, BYTES, DTYPES, LAYOUTS, check_pair, rounded
from wanlite_model.formats.read import open_wan
from wanlite_model.formats.readers import readers, told
from wanlite_model.formats.write import write_diffusers, write_student

CARD = StudentCard(steps=4, cfg=1.0, shift=5.0, teacher="t2v, 12 blocks of 128, FFN 512", teacher_fingerprint="0a1b", keep=(0, 2, 5), ffn_dim=64,
                   recipe={"teacher_layers": 12, "teacher_ffn_dim": 512, "train_steps": 1500, "rank": 0, "cfg": 5.0, "learning_rate": 1e-4},
                   measured={"held_out_error": 0.0123, "plain_cut_error": 0.5, "best_step": 12345})
ONE_THREE = WanConfig(dim=1536, ffn_dim=8960, num_layers=30)


@pytest.fixture(scope="module")
def student():
    return random_wan(depth=3, ffn_dim=64)


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def save_fp8(student, path, **options):
    return write_student(path, config=student.wan, tensors=student.state_dict().items(), layout="single file", dtype=torch.float8_e4m3fn, **options)


def save_gguf(student, path, kind="Q8_0", state=None, **options):
    state = state or student.state_dict()
    return write_gguf(path, config=student.wan, read=lambda names: ((name, state[name]) for name in names), kind=kind, **options)


# --- fp8

def test_fp8_has_the_names_and_the_header_that_every_comfyui_reads(student, models):
    report = save_fp8(student, models / "cats.safetensors", card=CARD)
    with safe_open(report.file, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    layers = [f"blocks.{i}.{layer}" for i in range(3) for layer in
              (*(f"{attn}.{part}" for attn in ("self_attn", "cross_attn") for part in "qkvo"), "ffn.0", "ffn.2")]
    assert json.loads(metadata["_quantization_metadata"]) == {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    assert metadata["wanlite.steps"] == "4" and "config" not in metadata
    assert found.keys() == {*student.state_dict(), *(f"{layer}.weight_scale" for layer in layers)}
    for name, tensor in found.items():
        kind = ((torch.float32, ()) if name.endswith(".weight_scale") else
                (torch.float8_e4m3fn if name.removesuffix(".weight") in layers else torch.bfloat16, tuple(student.state_dict()[name].shape)))
        assert (tensor.dtype, tuple(tensor.shape)) == kind, name


def test_fp8_is_within_its_precision_and_exact_in_half(student, models):
    """Three bits after the leading one: half a step is 1/16. A power of two as the scale makes the product exact in bf16 and fp16."""
    with safe_open(save_fp8(student, models / "cats.safetensors").file, framework="pt") as file:
        for name in fp8._layers({name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}):
            weight, scale = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale")
            exact = weight.float() * scale
            original = student.state_dict()[f"{name}.weight"]
            assert ((exact - original).abs() <= original.abs() / 16 + scale * 2.0**-10).all() and 224 <= weight.float().abs().max() <= 448
            for half in (torch.bfloat16, torch.float16):
                assert torch.equal((weight.to(half) * scale.to(half)).float(), exact)
            assert torch.equal(rounded("fp8", f"{name}.weight", original), exact)


def test_our_own_reader_gets_back_what_was_meant(student, models):
    """fp8 bit for bit: it hands out bf16, in which the scales are exact. GGUF rounded to that once more."""
    save_fp8(student, models / "cats.safetensors", card=CARD)
    save_gguf(student, models / "cats.gguf", card=CARD)
    for name, dtype in (("cats.safetensors", "fp8"), ("cats.gguf", "Q8_0")):
        with open_wan(models / name) as source:
            assert source.config == student.wan and source.card == CARD
            for layer, tensor in source.tensors():
                meant = rounded(dtype, layer, student.state_dict()[layer])
                assert torch.equal(tensor.float(), meant if dtype == "fp8" else meant.to(tensor.dtype).float()), layer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fp8_of_what_is_not_finite_is_refused_and_of_zeros_is_zeros(student, models, tmp_path, value):
    state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state["blocks.1.ffn.0.weight"][3, 3] = value
    before = tree(tmp_path)
    with pytest.raises(WanLiteError, match="'blocks.1.ffn.0.weight' holds a value that is not finite"):
        write_student(models / "cats.safetensors", config=student.wan, tensors=state.items(), layout="single file", dtype=torch.float8_e4m3fn)
    assert tree(tmp_path) == before
    assert torch.equal(fp8.rounded("blocks.0.ffn.0.weight", torch.zeros(4, 4)), torch.zeros(4, 4))


# --- GGUF

@pytest.mark.parametrize("kind, step", [("Q8_0", 1 / 127), ("Q5_0", 1 / 16), ("Q4_0", 1 / 8)])
def test_a_gguf_holds_what_comfyui_ggufs_loader_looks_for(student, models, kind, step):
    report = save_gguf(student, models / f"cats-{kind}.gguf", kind, card=CARD)
    reader = gguf.GGUFReader(report.file)
    assert reader.get_field("general.architecture").contents() == "wan"
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    assert reader.get_field("wanlite.keep").contents() == "[0, 2, 5]"
    state = student.state_dict()
    assert {tensor.name for tensor in reader.tensors} == state.keys() and sum(tensor.n_bytes for tensor in reader.tensors) == report.bytes
    for tensor in reader.tensors:
        original, stored = state[tensor.name], tensor.tensor_type.name
        assert tuple(int(size) for size in reversed(tensor.shape)) == tuple(original.shape)
        assert stored == (kind if tensor.name.startswith("blocks.") and original.ndim == 2 else
                          "F16" if original.ndim == 2 and not tensor.name.startswith("head.") else "F32")
        read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(original.shape)
        assert torch.equal(read, rounded(kind, tensor.name, original).reshape(original.shape))
        largest = original.abs().reshape(-1, 32).amax(1, keepdim=True) if stored == kind else original.abs().max()
        error = (read - original).abs().reshape(-1, 32) if stored == kind else (read - original).abs()
        assert (error <= largest * {kind: 1.01 * step, "F16": 2.0**-11, "F32": 0.0}[stored]).all(), tensor.name


def test_rows_that_cannot_be_quantised_stay_in_fp16_and_the_report_says_so(models):
    odd = random_wan(depth=2, ffn_dim=65)
    report = save_gguf(odd, models / "cats.gguf")
    assert stored_as("Q8_0", "blocks.0.ffn.2.weight", (128, 65)) == "F16" and stored_as("Q8_0", "blocks.0.ffn.0.weight", (65, 128)) == "Q8_0"
    assert report.notes == ("2 of its matrices are in fp16: Q8_0 takes rows of a multiple of 32, and FFN 65 is none.",)
    read_back(report.file, ((name, rounded("Q8_0", name, tensor)) for name, tensor in odd.state_dict().items()))


def test_reading_back_finds_one_wrong_number(student, models):
    report = save_gguf(student, models / "cats.gguf")
    expected = {name: rounded("Q8_0", name, tensor) for name, tensor in student.state_dict().items()}
    read_back(report.file, expected.items())
    expected["blocks.2.cross_attn.v.weight"][5, 7] += 1e-3
    with pytest.raises(WanLiteError, match="'blocks.2.cross_attn.v.weight' of cats.gguf reads back differently"):
        read_back(report.file, expected.items())
    del expected["blocks.2.cross_attn.v.weight"]
    with pytest.raises(WanLiteError, match="which this WAN does not have"):
        read_back(report.file, expected.items())


def test_a_gguf_goes_where_it_should_or_nowhere(student, models, tmp_path, monkeypatch):
    report = save_gguf(student, models / "cats.gguf", card=CARD, workflow_folder=tmp_path / "workflows")
    graph = json.loads(report.workflow.read_text(encoding="utf-8"))
    assert next(node for node in graph["nodes"] if node["type"] == "UnetLoaderGGUF")["widgets_values"] == ["cats.gguf"]
    (models / "theirs.gguf").write_bytes(b"GGUF" + bytes(100))
    before = tree(tmp_path)
    with pytest.raises(WanLiteError, match="already there.*turn overwrite on"):
        save_gguf(student, models / "cats.gguf")
    with pytest.raises(WanLiteError, match="WanLite did not write it"):
        save_gguf(student, models / "theirs.gguf", overwrite=True)
    broken = {**student.state_dict(), "blocks.2.ffn.0.bias": student.state_dict()["blocks.2.ffn.0.bias"] / 0}
    with pytest.raises(WanLiteError, match="'blocks.2.ffn.0.bias' holds a value that is not finite"):
        save_gguf(student, models / "dogs.gguf", state=broken)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(gguf.GGUFWriter, "write_tensor_data", refuse)
        with pytest.raises(WanLiteError, match="disk became full"):
            save_gguf(student, models / "cats.gguf", overwrite=True)
    assert tree(tmp_path) == before
    save_gguf(random_wan(seed=9, depth=2, ffn_dim=64), models / "cats.gguf", card=CARD, overwrite=True, workflow_folder=tmp_path / "workflows")
    assert tree(tmp_path).keys() == before.keys() and tree(tmp_path) != before


def test_without_the_gguf_package_the_way_to_get_it_is_told(student, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(gguf_write.importlib.util, "find_spec", lambda name: None)
    for attempt in (lambda: save_gguf(student, models / "cats.gguf"), lambda: check_pair("GGUF", "Q8_0")):
        with pytest.raises(WanLiteError, match="not installed.*-m pip install gguf"):
            attempt()
    check_pair("folder", "bf16")
    assert not any(models.iterdir())


# --- diffusers' folder

def test_a_diffusers_folder_is_read_as_the_same_wan_and_is_overwritten_only_where_it_is_ours(student, models, tmp_path):
    place = tmp_path / "output" / "wanlite" / "diffusers" / "cats"
    report = write_diffusers(place, config=student.wan, tensors=student.state_dict().items(), card=CARD, stated=Stated(picture=b"PNG"))
    assert {path.name for path in place.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors", "README.md", "picture.png"}
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] == "WanTransformer3DModel" and config["qk_norm"] == "rms_norm_across_heads" and config["_wanlite"]["keep"] == [0, 2, 5]
    with open_wan(report.path) as source:
        assert source.config == student.wan and source.card == CARD
        assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in source.tensors())
    write_diffusers(place, config=student.wan, tensors=student.state_dict().items(), dtype=torch.bfloat16, overwrite=True)
    assert {path.name for path in place.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    with pytest.raises(WanLiteError, match="already there"):
        write_diffusers(place, config=student.wan, tensors=student.state_dict().items())


# --- the model card

def test_a_folders_card_and_picture_are_replaced_with_it_and_never_somebody_elses(student, models, tmp_path):
    def save(**options):
        return write_student(models / "cats", config=student.wan, tensors=student.state_dict().items(), **options)

    save(card=CARD, stated=Stated(licence="Apache-2.0", picture=b"PNG"), dtype=torch.bfloat16)
    assert (models / "cats" / "picture.png").read_bytes() == b"PNG"
    save(stated=Stated(), overwrite=True)
    assert {path.name for path in (models / "cats").iterdir()} == {"config.json", "diffusion_model.safetensors", "README.md", "cats.workflow.json",
                                                                 "diffusion_pytorch_model.safetensors.index.json"}
    assert "picture" not in (models / "cats" / "README.md").read_text(encoding="utf-8")
    config = models / "cats" / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({name: value for name, value in fields.items() if name != "_wanlite"}), encoding="utf-8")
    before = tree(tmp_path)
    with pytest.raises(WanLiteError, match="holds README.md, which would be lost"):
        save(overwrite=True)
    assert tree(tmp_path) == before


def test_the_card_says_what_was_done_how_to_sample_what_was_measured_and_who_opens_it():
    config = WanConfig(dim=1536, ffn_dim=64, num_layers=3)
    text = model_card("cats", Stated(base_model="Wan-AI/Wan2.1-T2V-1.3B", licence="Apache-2.0", picture=b"PNG", merged=True), config=config, card=CARD,
                      layout="folder", dtype=torch.bfloat16)
    front = text.split("---")[1].strip().splitlines()
    assert front[:3] == ["license: apache-2.0", "base_model: Wan-AI/Wan2.1-T2V-1.3B", "pipeline_tag: text-to-video"] and "- wanlite" in front
    for line in ("![cats](picture.png)", "3 blocks of 1536, FFN 64: 83.1 M parameters, bfloat16",
                 "- Teacher: t2v, 12 blocks of 128, FFN 512.", "- Blocks: 3 of 12 were kept, those numbered 0, 2, 5.",
                 "- FFN: 64 of 512 neurons of each block were kept.", "- A LoRA was merged into the weights.",
                 "- Training: 1,500 steps of distillation from the teacher at cfg 5, of all weights, at a learning rate of 0.0001.",
                 "| steps | 4 |", "| cfg | 1 |", "| shift | 5 |", "| size | 832 x 480, 33 frames |", "The negative prompt has no effect",
                 "| held-out error of its velocity, relative to the teacher's | 0.0123 |", "| the training step that was kept | 12345 |",
                 "| ComfyUI | Load Diffusion Model |", "| WanVideoWrapper | not: it builds 30 blocks at width 1536, and this has 3 |"):
        assert line in text, line


def test_the_card_says_nothing_that_was_not_said():
    text = model_card("cats", Stated(base_model="Wan 2.1 T2V 1.3B", licence="My own 1.0"), config=ONE_THREE, card=StudentCard(steps=30, cfg=5.0),
                      layout="diffusers folder", dtype=None)
    front = text.split("---")[1]
    assert 'license: other\nlicense_name: "My own 1.0"' in front and "base_model" not in front and "library_name: diffusers" in front
    assert "from Wan 2.1 T2V 1.3B." in text and "negative" not in text and "picture" not in text and "## What was measured" not in text
    silent = model_card("cats", Stated(), config=ONE_THREE, card=None, layout="folder", dtype=None)
    assert "license" not in silent.split("---")[1] and "not stated" in silent and "How to sample" not in silent


def test_the_card_of_one_of_two_experts_says_which_noise_is_its_own():
    text = model_card("cats", Stated(), config=ONE_THREE, card=StudentCard(expert="low", boundary=0.875), layout="folder", dtype=None)
    assert "| noise levels | below sigma 0.875 only: the other expert of 2.2 A14B has the rest |" in text


@pytest.mark.parametrize("change, expert, words", [
    ({}, {}, "WanPipeline.from_pretrained"), ({"in_dim": 36, "model_type": "i2v"}, {}, "WanImageToVideoPipeline.from_pretrained"),
    ({}, {"expert": "high", "boundary": 0.875}, ", transformer=transformer"), ({}, {"expert": "low", "boundary": 0.875}, ", transformer_2=transformer")])
def test_the_code_for_diffusers_puts_a_student_where_it_belongs(change, expert, words):
    assert words in model_card("cats", Stated(), config=replace(ONE_THREE, **change), card=StudentCard(**expert), layout="diffusers folder", dtype=None)


def test_the_yaml_of_a_card_is_yaml():
    import yaml
    front = yaml.safe_load(model_card("cats", Stated(base_model="Wan-AI/Wan2.2-T2V-A14B", licence="a: b"), config=ONE_THREE, card=CARD, layout="folder",
                                      dtype=None).split("---")[1])
    assert front == {"license": "other", "license_name": "a: b", "base_model": "Wan-AI/Wan2.2-T2V-A14B", "pipeline_tag": "text-to-video",
                     "tags": ["wan", "wanlite", "distillation", "comfyui"]}


@pytest.mark.parametrize("what", ["base_model", "licence"])
@pytest.mark.parametrize("value", ["/home/me/wan.safetensors", "C:\\models\\wan", "a/b/c", "wan\nlicense: mit", 'a "b"', "../wan", "x" * 101, " wan"])
def test_a_stated_name_has_no_room_for_a_path_or_a_second_line(what, value):
    with pytest.raises(WanLiteError, match=f"{what} is .*which is no name"):
        Stated(**{what: value})


def test_nothing_in_a_saved_folder_tells_where_it_was_made(student, models, tmp_path):
    write_student(models / "cats", config=student.wan, tensors=student.state_dict().items(), card=CARD, stated=Stated(base_model="Wan 2.1"))
    save_gguf(student, models / "cats.gguf", card=CARD)
    told = (models / "cats" / "README.md").read_text(encoding="utf-8") + (models / "cats.gguf").read_bytes()[:20000].decode("latin-1")
    assert str(tmp_path) not in told and not re.search(r"/tmp|/home|/root|Users|prompt 0", told)


# --- who opens what, and what is refused

def opens(config, layout="folder", dtype="bf16", **more):
    return {reader.name for reader in readers(config, layout, dtype, **more) if not reader.why_not}


ALL = {"ComfyUI", "WanVideoWrapper", "Wan 2.1's code", "Wan 2.2's code", "diffusers", "WanLite"}


@pytest.mark.parametrize("config, absent", [
    (ONE_THREE, set()),
    (WanConfig(dim=1536, ffn_dim=4480, num_layers=30), set()),                          # FFN-slim
    (WanConfig(dim=1536, ffn_dim=8960, num_layers=20), {"WanVideoWrapper"}),            # depth-slim
    (WanConfig(dim=5120, ffn_dim=13824, num_layers=40), set()),
    (WanConfig(dim=5120, ffn_dim=13824, num_layers=39), {"WanVideoWrapper"}),
    (WanConfig(dim=1024, ffn_dim=4096, num_layers=30), {"WanVideoWrapper"}),
    (WanConfig(dim=5120, ffn_dim=13824, num_layers=40, in_dim=36, model_type="i2v", img_emb=True), {"Wan 2.2's code"}),
    (WanConfig(dim=5120, ffn_dim=13824, num_layers=40, in_dim=36, model_type="i2v"), {"Wan 2.1's code"}),
    (WanConfig(dim=5120, ffn_dim=13824, num_layers=40, in_dim=36, model_type="flf2v", img_emb=True), {"Wan 2.2's code", "diffusers"}),
    (WanConfig(dim=3072, ffn_dim=14336, num_layers=30, in_dim=48, out_dim=48, model_type="ti2v"), {"Wan 2.1's code"})])
def test_which_readers_open_a_folder_follows_from_the_architecture(config, absent):
    assert opens(config) == ALL - absent


def test_which_readers_open_it_follows_from_layout_and_dtype_and_every_refusal_has_a_reason():
    assert opens(ONE_THREE, "single file") == {"ComfyUI", "WanVideoWrapper", "WanLite"}
    assert opens(ONE_THREE, "single file", "fp8") == {"ComfyUI", "WanVideoWrapper", "WanLite"}
    assert opens(ONE_THREE, "diffusers folder") == {"diffusers", "WanLite"}
    assert opens(ONE_THREE, "GGUF", "Q8_0") == {"ComfyUI-GGUF", "WanVideoWrapper", "WanLite"}
    assert opens(ONE_THREE, "LoRA") == {"ComfyUI", "WanVideoWrapper", "diffusers", "WanLite"}
    assert opens(ONE_THREE, "LoRA", diffs=True) == {"ComfyUI", "WanVideoWrapper", "WanLite"}
    assert told(WanConfig(dim=1536, ffn_dim=8960, num_layers=20), "folder", "bf16") == (
        "It opens in ComfyUI, Wan 2.1's code, Wan 2.2's code, diffusers and WanLite; not in WanVideoWrapper (it builds 30 blocks at width 1536, and this "
        "has 20).")


@pytest.mark.parametrize("layout, dtype", [(layout, dtype) for layout in LAYOUTS for dtype in DTYPES])
def test_a_pair_that_no_reader_opens_is_refused_in_a_sentence(layout, dtype):
    if dtype in ALLOWED[layout]:
        check_pair(layout, dtype)
    else:
        with pytest.raises(WanLiteError, match=r"is not written\..*Choose"):
            check_pair(layout, dtype)


def test_every_dtype_has_its_size_and_unknown_words_are_refused():
    assert BYTES.keys() == set(DTYPES)
    for layout, dtype in (("zip", "bf16"), ("folder", "Q2_K")):
        with pytest.raises(WanLiteError, match="Choose one of each"):
            check_pair(layout, dtype)


def test_an_fp8_folder_is_not_written(student, models):
    with pytest.raises(WanLiteError, match="fp8 is for ComfyUI: a folder"):
        write_student(models / "cats", config=student.wan, tensors=student.state_dict().items(), dtype=torch.float8_e4m3fn)
    assert not any(models.iterdir())
