"""What a predecessor wrote opens as a recipe: each field in WAN's terms, the size it names, and what to ask of a teacher."""
import json
import re

import pytest
from helpers_predecessor import FIELDS, LAYOUTS, write_predecessor
from helpers_tiny import random_wan

from wanlite_model.compress.handle import StudentHandle
from wanlite_model.config import WanConfig
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.keymap import wan_size
from wanlite_model.legacy import recipe_of
from wanlite_model.transformer import WanLiteStudent


def told_of(path):
    with pytest.raises(WanLiteError) as error:
        StudentHandle.of(path)
    return str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_told_field_by_field(tmp_path, layout):
    folder = write_predecessor(tmp_path / "cats", layout)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    told = told_of(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert re.findall(r"^- (\w+)=", told, re.M) == list(FIELDS)
    for sentence in ("hidden_size=1024 is the width", "depth=16 is the number of blocks", "num_heads=16 is read as 8", "num_channels=4 is read as 16",
                     "patch_size=16 is read as (1, 2, 2)", "text_max_length=77 is read as 512", "text_encoder_output_dim=768 is read as 4096",
                     "no cross-attention, no modulation and no rotary positions", "16 blocks of 1024 with FFN 4096: 0.282 billion parameters",
                     "WAN 2.1 1.3B, whose width is 1536", "preset=custom, depth=16, ffn_dim=6144"):
        assert sentence in told, sentence
    assert ("It holds no .safetensors file" in told) == (not LAYOUTS[layout])


def test_the_size_it_names_is_that_of_the_student_that_is_built_of_it():
    recipe = recipe_of({**FIELDS, "hidden_size": 256, "depth": 2, "num_heads": 2})
    built = WanLiteStudent({**FIELDS, "hidden_size": 256, "depth": 2, "num_heads": 2})
    assert recipe.config == built.wan and built.num_parameters() == wan_size(recipe.config)


@pytest.mark.parametrize("changes, config, words", [
    ({"hidden_size": 1000}, WanConfig(dim=1024, ffn_dim=4096, num_layers=16), "1.3B.*1536 .the nearest.*depth=16, ffn_dim=6144 .as many"),
    ({"hidden_size": 1536, "depth": 48}, WanConfig(dim=1536, ffn_dim=6144, num_layers=48), "1.3B.*1536 .the same.*depth=30 .all it has., ffn_dim=6144"),
    ({"hidden_size": 5120, "depth": 20}, WanConfig(dim=5120, ffn_dim=20480, num_layers=20), "14B.*5120 .the same.*depth=20, ffn_dim=13824 .all it has"),
    ({"num_channels": 48}, WanConfig(dim=1024, ffn_dim=4096, num_layers=16, in_dim=48, out_dim=48), "TI2V-5B.*3072.*depth=16, ffn_dim=12288"),
])
def test_what_to_ask_of_a_teacher_follows_the_recipe(changes, config, words):
    recipe = recipe_of({**FIELDS, **changes})
    assert re.search(words, recipe.steps())
    assert recipe.config == config


@pytest.mark.parametrize("changes", [{"depth": "16"}, {"hidden_size": None}, {"depth": True}, {"hidden_size": -5}, {"ffn_dim": 0.5}])
def test_a_size_that_is_no_number_is_told_and_not_guessed(changes):
    recipe, name = recipe_of({**FIELDS, **changes}), next(iter(changes))
    assert recipe.config is None and "depth=" not in recipe.steps()
    told = f"{name}={changes[name]!r} is no whole number of at least 1: no WAN can be built of it."
    assert [line for line in recipe.lines if line.startswith(name)] == [told]


@pytest.mark.parametrize("name, most", [("hidden_size", 65536), ("depth", 1000), ("ffn_dim", 1048576)])
def test_a_size_beyond_every_wan_is_told_and_never_an_error(name, most):
    recipe = recipe_of({**FIELDS, name: 2 * most})
    assert recipe.config is None and f"{name}={2 * most} is above {most}: no WAN can be built of it." in recipe.lines
    assert recipe_of({**FIELDS, name: most}).config is not None


def test_channels_as_json_may_write_them_are_channels():
    assert recipe_of({**FIELDS, "num_channels": 48.0}).config.in_dim == 48


def test_a_field_that_is_missing_or_unknown_is_told():
    fields = {name: value for name, value in FIELDS.items() if name != "depth"}
    lines = recipe_of({**fields, "mlp_ratio": 4, "_name_or_path": "/home/me"}).lines
    assert "depth=None is no whole number" in lines[-1] and "mlp_ratio=4 is not a field of a WAN" in " ".join(lines) and "/home/me" not in " ".join(lines)


def test_its_file_of_weights_is_known_by_the_config_beside_it(tmp_path):
    folder = write_predecessor(tmp_path / "cats", "config.json")
    assert "student of WanLite's predecessor. Its weights cannot become a WAN" in told_of(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "other.safetensors")
    assert "predecessor" not in told_of(folder / "other.safetensors")
    assert "is not there" in told_of(folder / "diffusion_pytorch_model.safetensors")


def test_a_wan_with_such_a_config_is_a_wan_and_its_own_faults_are_told(tmp_path):
    folder = random_wan(depth=2, ffn_dim=512).save_pretrained(tmp_path / "cats").path
    fields = {"model_type": "WanLiteStudent", "hidden_size": 128, "depth": 2, "projection_factor": 1.0}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    assert StudentHandle.of(folder).config.num_layers == 2
    (folder / "config.json").write_text(json.dumps({**fields, "depth": 3}), encoding="utf-8")
    assert "says num_layers=3, and its weights have 2" in told_of(folder)


def test_what_wanlite_writes_is_no_recipe(tmp_path):
    folder = random_wan(depth=2).save_pretrained(tmp_path / "cats").path
    assert recipe_of(json.loads((folder / "config.json").read_text(encoding="utf-8"))) is None
