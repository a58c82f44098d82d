"""Every storage of a WAN is read as the numbers that its weights are, or refused by name."""
import json
import struct
import sys

import pytest
import torch
from helpers_storage import E4M3, E5M2, is_linear, plain, scaled, write_gguf
from helpers_tiny import random_wan
from safetensors.torch import save_file

from wanlite_model.compress.handle import StudentHandle
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.keymap import key_map
from wanlite_model.formats.quantised import UnknownFormat
from wanlite_model.formats.read import open_wan
from wanlite_model.teacher import FileTeacher
from wanlite_model.transformer import WanLiteStudent


@pytest.fixture(scope="module")
def weights():
    """bf16 with norms in fp32, as released files are."""
    student = random_wan(depth=3, ffn_dim=256)
    return {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in student.state_dict().items()}


def in_blocks(name, tensor):
    return is_linear(name, tensor) and name.startswith("blocks.1.")


STORAGES = {
    "float8": lambda w: plain(w, E4M3),
    "float8 in matrices only": lambda w: plain(w, E4M3, is_linear),
    "float8_e5m2": lambda w: plain(w, E5M2, is_linear),
    "scaled_fp8": lambda w: scaled(w, "old"),
    "scaled_fp8 of e5m2": lambda w: scaled(w, "old", E5M2),
    "scaled_fp8, some layers": lambda w: scaled(w, "old", chosen=in_blocks),
    "header": lambda w: scaled(w, "header"),
    "header, some layers": lambda w: scaled(w, "header", chosen=in_blocks),
    "header, e5m2": lambda w: scaled(w, "header", E5M2),
    "layers": lambda w: scaled(w, "layer"),
    "layers, some": lambda w: scaled(w, "layer", chosen=in_blocks),
    "layers in int8": lambda w: scaled(w, "layer", torch.int8),
    "layers in int8, a scale for each row": lambda w: scaled(w, "layer", torch.int8, rows=True),
}
KINDS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q4_K", "Q6_K", "BF16", "F16")


def assert_read(path, kept, dtypes):
    """Each tensor is the value computed beside, rounded once to what it is handed out in."""
    with open_wan(path) as source:
        assert source.dtype == torch.bfloat16 and source.packed == bool(kept.packed)
        found = dict(source.tensors())
    assert found.keys() == kept.weights.keys()
    for name, value in kept.weights.items():
        assert found[name].dtype == (torch.bfloat16 if name in kept.packed else dtypes[name]), name
        assert torch.equal(found[name], value.to(found[name].dtype)), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_storage_is_read_as_the_numbers_that_its_weights_are(storage, prefix, weights, tmp_path):
    kept = STORAGES[storage](weights)
    save_file({prefix + name: tensor.clone() for name, tensor in kept.tensors.items()}, tmp_path / "wan.safetensors", kept.header)
    assert_read(tmp_path / "wan.safetensors", kept, {name: tensor.dtype for name, tensor in kept.tensors.items()})


def test_names_in_a_header_may_carry_the_files_prefix(weights, tmp_path):
    kept, prefix = scaled(weights, "header"), "model.diffusion_model."
    layers = json.loads(kept.header["_quantization_metadata"])["layers"]
    header = {"_quantization_metadata": json.dumps({"layers": {prefix + name: fields for name, fields in layers.items()}})}
    save_file({prefix + name: tensor.clone() for name, tensor in kept.tensors.items()}, tmp_path / "wan.safetensors", header)
    assert_read(tmp_path / "wan.safetensors", kept, {name: tensor.dtype for name, tensor in kept.tensors.items()})


@pytest.mark.parametrize("marking", ["old", "header", "layer"])
def test_shards_in_diffusers_names_are_read_with_their_scales(marking, weights, tmp_path):
    """A scale may lie in another shard than its weight."""
    kept, names = scaled(weights, marking), key_map("wan", "diffusers", 3)

    def renamed(name):
        layer, _, leaf = name.rpartition(".")
        return names.get(name) or (names[f"{layer}.weight"].removesuffix("weight") + leaf if layer else name)

    parts = ({}, {})
    for name, tensor in kept.tensors.items():
        parts[name.endswith((".weight", "scaled_fp8"))][renamed(name)] = tensor.clone()
    layers = json.loads(kept.header.get("_quantization_metadata", '{"layers": {}}'))["layers"]
    header = {"_quantization_metadata": json.dumps({"layers": {renamed(f"{name}.weight").removesuffix(".weight"): fields
                                                               for name, fields in layers.items()}})} if layers else {}
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"{i}.safetensors", header)
    index = {"weight_map": {name: f"{i}.safetensors" for i, part in enumerate(parts) for name in part}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_read(tmp_path, kept, {name: tensor.dtype for name, tensor in kept.tensors.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_is_read_as_the_numbers_that_its_weights_are(kind, weights, tmp_path):
    kept = write_gguf(tmp_path / "wan.gguf", weights, kind)
    with open_wan(tmp_path / "wan.gguf") as source:
        found = dict(source.tensors())
        assert source.packed == (kind not in ("BF16", "F16"))
        assert source.dtype == (torch.float16 if kind == "F16" else torch.bfloat16)
    assert found.keys() == weights.keys()
    for name, value in kept.weights.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name
        assert found[name].dtype == torch.bfloat16 if name in kept.packed else torch.equal(found[name].float(), value), name


def test_unpacked_weights_are_near_what_was_packed(weights, tmp_path):
    """Values and scales are not mixed up between layers: no weight is further off than its format's step."""
    for kept, step in ((scaled(weights, "layer"), 2**-4), (scaled(weights, "layer", torch.int8), 1 / 127)):
        with open_wan(kept.save(tmp_path / "wan.safetensors")) as source:
            for name in kept.packed:
                off = (source.tensor(name).float() - weights[name].float()).abs().max()
                assert off < step * weights[name].abs().max(), name


@pytest.mark.parametrize("storage", ["scaled_fp8", "Q8_0"])
def test_a_quantised_file_is_a_teacher_and_a_student_with_one_fingerprint(storage, weights, tmp_path):
    path = tmp_path / ("wan.gguf" if storage == "Q8_0" else "wan.safetensors")
    kept = write_gguf(path, weights, storage) if storage == "Q8_0" else STORAGES[storage](weights)
    if storage != "Q8_0":
        kept.save(path)
    teacher, handle = FileTeacher(path, shift=3.0, device=torch.device("cpu")), StudentHandle.of(path)
    assert teacher.fingerprint == handle.fingerprint == FileTeacher(path, shift=3.0, device=torch.device("cpu")).fingerprint
    assert handle.file == path and handle.dtype == torch.bfloat16
    for student in (handle.load(), WanLiteStudent.from_pretrained(path)):
        assert all(torch.equal(tensor, kept.weights[name].bfloat16()) for name, tensor in student.state_dict().items())


def test_another_scale_is_another_fingerprint(weights, tmp_path):
    kept = scaled(weights, "layer")
    before = StudentHandle.of(kept.save(tmp_path / "wan.safetensors")).fingerprint
    kept.tensors["blocks.1.ffn.0.weight_scale"] *= 1.5
    assert StudentHandle.of(kept.save(tmp_path / "wan.safetensors")).fingerprint != before


# --- what is refused

def note(fields):
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


LAYER = "blocks.1.ffn.0"
BAD = {
    "nvfp4": ("layer", {f"{LAYER}.comfy_quant": note({"format": "nvfp4"})}, UnknownFormat, f"wan.safetensors: {LAYER} is kept as nvfp4.*Load Diffusion Model"),
    "rotated int8": ("layer", {f"{LAYER}.comfy_quant": note({"format": "int8_tensorwise", "convrot": True})}, UnknownFormat,
                     "int8_tensorwise with convrot"),
    "another dtype than is told": ("layer", {f"{LAYER}.comfy_quant": note({"format": "float8_e5m2"})}, UnknownFormat, "float8_e5m2, in F8_E4M3"),
    "no format": ("layer", {f"{LAYER}.comfy_quant": note({})}, UnknownFormat, "is kept as None"),
    "a format that is no word": ("layer", {f"{LAYER}.comfy_quant": note({"format": ["int8_tensorwise"]})}, UnknownFormat, "is kept as"),
    "blocks": ("layer", {f"{LAYER}.weight_scale": torch.ones(256, 4)}, UnknownFormat, r"in blocks, with scales of shape \[256, 4\]"),
    "a scale in bytes": ("layer", {f"{LAYER}.weight_scale": torch.ones(256, 1, dtype=torch.uint8)}, UnknownFormat, "a scale in U8"),
    "no scale": ("layer", {f"{LAYER}.weight_scale": None}, UnknownFormat, "with no scale"),
    "no JSON": ("layer", {f"{LAYER}.comfy_quant": torch.tensor([123], dtype=torch.uint8)}, WanLiteError, "cannot be read as JSON"),
    "no fields": ("layer", {f"{LAYER}.comfy_quant": note(3)}, WanLiteError, "holds no fields"),
    "floats for JSON": ("layer", {f"{LAYER}.comfy_quant": torch.zeros(3)}, WanLiteError, "It holds JSON"),
    "a missing weight": ("layer", {f"{LAYER}.weight": None}, WanLiteError, f"'{LAYER}.weight' is missing"),
    "a scale of no layer": ("layer", {"blocks.1.extra.weight_scale": torch.ones(())}, WanLiteError, "'blocks.1.extra.weight_scale' is not a tensor"),
    "no mark of a layer": ("layer", {f"{LAYER}.comfy_quant": None}, WanLiteError, f"'{LAYER}.input_scale' is not a tensor"),
    "no mark": ("old", {"scaled_fp8": None}, WanLiteError, "scale.* is not a tensor"),
    "a scaled float": ("old", {f"{LAYER}.weight": torch.zeros(256, 128)}, UnknownFormat, "is kept as F32"),
    "bytes without a mark": ("old", {f"{LAYER}.bias": torch.zeros(256, dtype=torch.uint8)}, UnknownFormat, "in a way that it does not name.*U8"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_unpacked_is_refused_by_name(what, weights, tmp_path):
    marking, changes, kind, told = BAD[what]
    kept = scaled(weights, marking)
    kept.tensors = {name: tensor for name, tensor in {**kept.tensors, **changes}.items() if tensor is not None}
    with pytest.raises(kind, match=told) as error, open_wan(kept.save(tmp_path / "wan.safetensors")):
        pass
    assert isinstance(error.value, UnknownFormat) == (kind is UnknownFormat)


@pytest.mark.parametrize("header, told", [("{", "cannot be read as JSON"), ("[]", "holds no fields"), ("{}", "names no layers")])
def test_a_header_that_names_no_formats_is_refused(header, told, weights, tmp_path):
    save_file(weights, tmp_path / "wan.safetensors", {"_quantization_metadata": header})
    with pytest.raises(WanLiteError, match=f"wan.safetensors: .*{told}"), open_wan(tmp_path / "wan.safetensors"):
        pass


@pytest.mark.parametrize("size", [0, 4, 100, 3000, -1, -5000])
def test_a_truncated_gguf_is_refused(size, weights, tmp_path):
    path = tmp_path / "wan.gguf"
    write_gguf(path, weights, "Q8_0")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WanLiteError, match="wan.gguf is not a whole GGUF file.*again"), open_wan(path):
        pass


@pytest.mark.parametrize("listed", [struct.pack("<IIQ", 9, 0, 2**40), struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, struct.pack("<IIQ", 9, 0, 10**6) + bytes(10**6)],
                         ids=["endless", "nested", "long"])
def test_a_gguf_with_a_list_that_nobody_can_have_meant_is_refused(listed, tmp_path):
    """The package's reader would take what lies behind the file's end for an endless row of nothing."""
    (tmp_path / "wan.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + listed)
    with pytest.raises(WanLiteError, match="wan.gguf is not a whole GGUF file.*again"), open_wan(tmp_path / "wan.gguf"):
        pass


def test_a_gguf_that_is_no_whole_wan_is_refused(weights, tmp_path):
    write_gguf(tmp_path / "wan.gguf", {name: tensor for name, tensor in weights.items() if name != f"{LAYER}.bias"}, "Q8_0")
    with pytest.raises(WanLiteError, match=f"'{LAYER}.bias' is missing"), open_wan(tmp_path / "wan.gguf"):
        pass


def test_a_gguf_of_a_format_that_the_package_cannot_unpack_is_refused(weights, tmp_path, monkeypatch):
    import gguf
    write_gguf(tmp_path / "wan.gguf", weights, "Q5_1")
    monkeypatch.setitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q5_1, None)
    with pytest.raises(UnknownFormat, match="as Q5_1.*Q8_0"), open_wan(tmp_path / "wan.gguf"):
        pass


def test_without_the_package_a_gguf_gets_a_sentence(weights, tmp_path, monkeypatch):
    write_gguf(tmp_path / "wan.gguf", weights, "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WanLiteError, match="pip install gguf"), open_wan(tmp_path / "wan.gguf"):
        pass
