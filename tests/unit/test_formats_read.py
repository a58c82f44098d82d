"""Opening a WAN: every layout that is one, and a sentence for everything that is not."""
import json
import os
import random
import shutil

import pytest
import torch
from helpers_tiny import random_wan
from safetensors.torch import save_file

from wanlite_model.errors import WanLiteError
from wanlite_model.formats.container import read_header
from wanlite_model.formats.read import PREFIXES, open_wan
from wanlite_model.transformer import WanLiteStudent


@pytest.fixture(scope="module")
def student():
    return random_wan(depth=3, ffn_dim=64)


@pytest.fixture(scope="module")
def saved(student, tmp_path_factory):
    return student.save_pretrained(tmp_path_factory.mktemp("models") / "diffusion_models" / "cats").path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "cats")


@pytest.fixture
def weights(student):
    return dict(student.state_dict())


def refuses(path, told):
    with pytest.raises(WanLiteError, match=told), open_wan(path):
        pass


def same(path, student):
    with open_wan(path) as source:
        assert source.config == student.wan
        found = dict(source.tensors())
    assert found.keys() == student.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in student.state_dict().items())


# --- what is a WAN

@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_a_file_is_read_under_every_known_prefix(prefix, student, weights, tmp_path):
    save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "wan.safetensors")
    same(tmp_path / "wan.safetensors", student)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_sharded_folder_is_one_wan(shards, student, weights, tmp_path):
    names = list(weights)
    files = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
    same(tmp_path, student)


def test_a_folder_is_read_with_and_without_its_config_and_its_index(folder, student):
    same(folder, student)
    (folder / "config.json").unlink()
    same(folder, student)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    same(folder, student)


def test_the_dtype_is_that_of_most_weights_and_each_tensor_keeps_its_own(weights, tmp_path):
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in weights.items()}
    save_file(mixed, tmp_path / "wan.safetensors")
    with open_wan(tmp_path / "wan.safetensors") as source:
        assert source.dtype == torch.bfloat16
        assert {name: tensor.dtype for name, tensor in source.tensors()} == {name: tensor.dtype for name, tensor in mixed.items()}


def test_wan_videos_config_of_an_i2v_leaves_the_clip_branch_to_the_weights(tmp_path):
    """2.1's and 2.2's I2V have the same config.json; one has the branch, the other has not."""
    for image in ({}, {"image_dim": 1280}):
        student = random_wan(depth=1, ffn_dim=64, model_type="i2v", in_dim=36, **image)
        folder = tmp_path / str(len(image))
        folder.mkdir()
        save_file(dict(student.state_dict()), folder / "wan.safetensors")
        (folder / "config.json").write_text(json.dumps(student.wan.to_wan()), encoding="utf-8")
        same(folder, student)


def test_what_is_read_is_not_mapped_so_the_file_may_be_changed_afterwards(folder, student):
    file = folder / "diffusion_model.safetensors"
    opened = WanLiteStudent.from_pretrained(folder)
    with file.open("r+b") as handle:                    # what a mapping would show through
        handle.seek(-4096, 2)
        handle.write(bytes(4096))
    assert all(torch.equal(a, b) for a, b in zip(opened.state_dict().values(), student.state_dict().values()))


def test_loading_can_change_the_dtype(saved, student):
    opened = WanLiteStudent.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(opened.state_dict().values(), student.state_dict().values()))


# --- what is not whole

@pytest.mark.parametrize("size", [0, 5, 8, 100, 5000, -1, -4096])
def test_a_truncated_file_is_refused(folder, size):
    file = folder / "diffusion_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    refuses(folder, "not a whole safetensors file.*again")
    file.write_bytes(data + b"\0")
    refuses(folder, "not a whole safetensors file.*again")


def test_any_byte_of_the_header_may_be_wrong(folder):
    """A changed header is refused in a sentence, or changed nothing that counts (white space, a dtype of the same width)."""
    file = folder / "diffusion_model.safetensors"
    data, chance = file.read_bytes(), random.Random(0)
    length = int.from_bytes(data[:8], "little")
    refused = 0
    for _ in range(150):
        changed = bytearray(data)
        changed[chance.randrange(8 + length)] = chance.randrange(256)
        file.write_bytes(changed)
        try:
            with open_wan(file) as source:
                assert source.config.num_layers == 3
        except WanLiteError:
            refused += 1
    assert refused > 75


def header(**tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("data", [
    header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}) + bytes(12),
    header(a={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}) + bytes(12),
    header(a={"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}) + bytes(8),
    header(a={"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}) + bytes(8),
    header(a={"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}) + bytes(8),
    header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}) + bytes(8),
    header(a={"dtype": "F32", "shape": [2]}) + bytes(8),
    header(a=[1]) + bytes(8),
    header(__metadata__={"format": 1}, a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + bytes(8),
    header(__metadata__=[]),
    (4).to_bytes(8, "little") + b"null",
    (2**62).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"\xff\xfe",
    (12).to_bytes(8, "little") + b'{"a":1,"a":2}',
    (100).to_bytes(8, "little") + b'[' * 100,
    header(a={"dtype": "F32", "shape": [2] * 20, "data_offsets": [0, 2**22]}) + bytes(2**22),
    header(a={"dtype": "XX", "shape": [2], "data_offsets": [0, 10**4299]}),
], ids=range(17))
def test_a_header_that_lies_is_refused(data, tmp_path):
    (tmp_path / "wan.safetensors").write_bytes(data)
    refuses(tmp_path / "wan.safetensors", "wan.safetensors is not a whole safetensors file")


# --- what is whole and no WAN

def without(name):
    return lambda weights: {key: tensor for key, tensor in weights.items() if not key.startswith(name)}


@pytest.mark.parametrize("change, told", [
    (without("blocks.1."), "'blocks.2.*not a tensor of this WAN"),
    (without("blocks.2.norm3.bias"), "'blocks.2.norm3.bias' is missing"),
    (without("text_embedding.0.bias"), "'text_embedding.0.bias' is missing"),
    (without("blocks.0."), "'blocks.0.ffn.0.weight' is missing"),
    (without("head."), "not a WAN: 'head.modulation' is missing among its"),
    (lambda w: {**w, "vace_blocks.0.norm.weight": torch.zeros(1)}, "'vace_blocks.0.norm.weight' is not a tensor of this WAN"),
    (lambda w: {**w, "blocks.1.ffn.0.bias": torch.zeros(65)}, r"'blocks.1.ffn.0.bias' has shape \[65\].*has \[64\]"),
    (lambda w: {**w, "head.modulation": torch.zeros(1, 2, 1000)}, "hidden_size 1000 cannot work.*896 or 1024"),
    (lambda w: {**w, "blocks.0.ffn.0.weight": w["blocks.0.ffn.0.weight"].char()}, "quantised.*I8.*Load Diffusion Model"),
    (lambda w: {**w, "head.head.bias": w["head.head.bias"].double()}, "rare dtype.*F64"),
    (lambda w: {"conv_in.bias": torch.zeros(2)}, "not a WAN.*first: conv_in.bias"),
], ids=range(11))
def test_a_file_that_is_no_wan_is_refused_by_name(change, told, weights, tmp_path):
    save_file(change(weights), tmp_path / "wan.safetensors")
    refuses(tmp_path / "wan.safetensors", told)


@pytest.mark.parametrize("change, told", [
    ({"num_layers": 30, "depth": 30}, "says num_layers=30, and its weights have 3"),
    ({"dim": 256, "hidden_size": 256, "num_heads": 2, "num_attention_heads": 2}, "says dim=256, and its weights have 128"),
    ({"ffn_dim": 512}, "says ffn_dim=512, and its weights have 64"),
    ({"in_dim": 36, "in_channels": 36}, "says in_dim=36"),
    ({"image_dim": 1280}, "says img_emb=True, and its weights have False"),
    ({"hidden_size": 1000}, "config.json of cats: .*contradicts itself"),
    ({"num_heads": 16, "num_attention_heads": 16}, "config.json of cats: .*contradicts itself"),
    ({"text_dim": 1024, "text_encoder_output_dim": 1024}, "config.json of cats: .*4096"),
])
def test_a_config_that_contradicts_its_weights_is_refused(folder, change, told):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    refuses(folder, told)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00", "[" * 200_000, '{"dim": ' + "9" * 5000 + "}"], ids=range(6))
def test_a_config_that_is_no_config_is_refused(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    refuses(folder, "config.json")


@pytest.mark.parametrize("index, told", [
    ({"weight_map": {"head.modulation": "absent.safetensors"}}, "names absent.safetensors, which is not there"),
    ({"weight_map": {"head.modulation": "../diffusion_model.safetensors"}}, "of its own folder"),
    ({"weight_map": {"head.modulation": "weights.bin"}}, "of its own folder"), ({"weight_map": {"head.modulation": "C:model.safetensors"}}, "of its own folder"),
    ({"weight_map": {"head.modulation": "n" * 5000 + ".safetensors"}}, "which is not there"),
    ({"weight_map": {}}, "of its own folder"), ({"weight_map": 3}, "of its own folder"), ([], "holds no fields"),
])
def test_an_index_that_leads_nowhere_is_refused(folder, index, told):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refuses(folder, told)


def test_the_same_tensor_in_two_shards_is_refused(folder):
    save_file({"head.modulation": torch.zeros(1, 2, 128)}, folder / "other.safetensors")
    index = {"weight_map": {"head.modulation": "other.safetensors", "head.head.bias": "diffusion_model.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refuses(folder, "'head.modulation' twice")


def test_folders_without_a_clear_answer_say_what_to_choose(folder, tmp_path):
    refuses(tmp_path, "no .safetensors file. Choose the folder cats")
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    shutil.copy(folder / "diffusion_model.safetensors", folder / "other.safetensors")
    refuses(folder, "2 .safetensors files and no index file")
    refuses(tmp_path / "dogs", "dogs is not there")


def test_a_file_may_be_called_sft(weights, student, tmp_path):
    save_file(weights, tmp_path / "wan.sft")
    with open_wan(tmp_path / "wan.sft") as source:
        assert source.config == student.wan


@pytest.mark.parametrize("name, told", [("wan.pt", "pickle"), ("wan.ckpt", "pickle"), ("wan.gguf", "not a whole GGUF file")])
def test_no_pickle_is_ever_opened(tmp_path, name, told):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refuses(tmp_path / name, told)


def test_a_folder_a_pipe_and_a_name_that_no_file_can_have_are_no_wans(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "wan.safetensors").mkdir()
    refuses(tmp_path / "folder", "not a whole safetensors file.*is no file")
    refuses(tmp_path / ("n" * 5000 + ".safetensors"), "is not there")
    refuses(tmp_path / "a\0b.safetensors", "is not there")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        refuses(tmp_path / "pipe.safetensors", "pipe.safetensors is no file")


@pytest.mark.parametrize("name", [f"blocks.{'9' * 5000}.ffn.0.weight", "blocks.99999999999.ffn.0.weight"], ids=range(2))
def test_a_block_of_an_absurd_number_is_refused(name, weights, tmp_path):
    save_file({**weights, name: torch.zeros(1)}, tmp_path / "wan.safetensors")
    refuses(tmp_path / "wan.safetensors", "is not a tensor of this WAN")


@pytest.mark.parametrize("config", ["config.json", "student_config.json"])
def test_a_predecessors_folder_is_refused_with_the_reason(tmp_path, config):
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(2, 2)}, tmp_path / "diffusion_model.safetensors")
    (tmp_path / config).write_text(json.dumps({"hidden_size": 1024, "depth": 16, "projection_factor": 1.0}), encoding="utf-8")
    refuses(tmp_path, "predecessor of WanLite.*Create a new student")


def test_a_stranger_may_have_written_our_keys(weights, tmp_path):
    """Metadata that is not ours does not keep a WAN from opening; only asking for the card fails."""
    save_file(weights, tmp_path / "wan.safetensors", {"wanlite.steps": "-3", "wanlite.keep": "not json", "format": "pt"})
    with open_wan(tmp_path / "wan.safetensors") as source:
        assert source.provenance == {"steps": -3}
        with pytest.raises(WanLiteError, match="wrong steps"):
            source.card
    assert read_header(tmp_path / "wan.safetensors").metadata["format"] == "pt"
    save_file(weights, tmp_path / "wan.safetensors", {"wanlite.legacy": "[0]", "wanlite.recipe": "[" * 100_000})
    assert WanLiteStudent.from_pretrained(tmp_path / "wan.safetensors").legacy == {}
