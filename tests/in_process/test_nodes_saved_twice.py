"""Save Student where something of that name is there: the very same student is not written again, and nothing else is lost."""
import dataclasses
import json
from functools import partial

import pytest
import torch
from helpers_bridge import call
from helpers_tiny import random_wan

FORMATS = [("folder", "bf16"), ("single file", "fp16"), ("single file", "fp8"), ("diffusers folder", "fp32"), ("GGUF", "Q8_0")]


@pytest.fixture(scope="module")
def student(comfyui, pack):
    """A student with a card, as Load Student hands it on."""
    engine = pack("wanlite_model.formats.card")
    card = engine.StudentCard(steps=4, cfg=1.0, keep=(0, 2), ffn_dim=128, recipe={"teacher_layers": 3, "cfg": 5.0}, measured={"held_out_error": 0.125})
    return made(comfyui, pack, "twice", card, seed=21)


def made(comfyui, pack, name, card, seed):
    wan = pack("wanlite_model.transformer").WanLiteStudent
    folder = comfyui.base / "output" / name
    source = random_wan(seed=seed, depth=2, ffn_dim=128)
    module = wan(hidden_size=128, depth=2, ffn_dim=128)
    module.load_state_dict(source.state_dict())
    module.card = card
    module.save_pretrained(folder, overwrite=True)
    return pack("wanlite_model.compress.handle").StudentHandle.of(folder)


@pytest.fixture(autouse=True)
def unverified(pack, monkeypatch):
    """No forward is computed to compare with: what a save writes is not the question here."""
    verify = pack("nodes.comfy_bridge.verify")
    nothing = verify.Recorded(x=None, sigma=None, cond=None, velocity=None, why="not asked for.")
    monkeypatch.setattr(pack("nodes.comfy_bridge.save"), "record", lambda student, dtype: nothing)


@pytest.fixture
def save(pack):
    def saved(student, name, format="folder", dtype="bf16", **given):
        return call(pack("nodes.student").WanLiteSaveStudent, student=student, name=name, format=format, dtype=dtype, **given)
    return saved


@pytest.fixture
def disk(comfyui):
    """Every file that a save may touch, with the moment when it was written."""
    def found():
        return {path: path.stat().st_mtime_ns for folder in ("models", "output") for path in (comfyui.base / folder).rglob("*") if path.is_file()}
    return found


@pytest.mark.parametrize("format, dtype", FORMATS)
def test_the_very_same_student_is_not_written_again_with_overwrite_on_or_off(format, dtype, student, save, disk, pack, monkeypatch):
    name = f"twice {format} {dtype}"
    first = save(student, name, format, dtype)
    assert "Saved" in first[1]
    before = disk()
    monkeypatch.setattr(pack("nodes.comfy_bridge.save"), "record", None)            # no forward either
    for overwrite in (False, True):
        listed, report = save(student, name, format, dtype, overwrite=overwrite)
        assert listed == first[0] and "It opens in" in report
        assert f"was there already: this very student as a {format} in {dtype}. Nothing was written." in report
    assert disk() == before


CHANGED = {
    "another dtype": lambda student, make: (student, {"dtype": "fp16"}),
    "other weights with the same card": lambda student, make: (make("other", student.card, seed=22), {}),
    "another measured number": lambda student, make: (make("better", dataclasses.replace(student.card, measured={"held_out_error": 0.1249}), seed=21), {}),
    "another licence": lambda student, make: (student, {"licence": "Apache-2.0"}),
    "a picture": lambda student, make: (student, {"picture": torch.zeros(1, 4, 4, 3)}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_differs_is_refused_without_overwrite_and_replaced_with_it(what, student, save, disk, comfyui, pack, refused):
    other, given = CHANGED[what](student, partial(made, comfyui, pack))
    save(student, "differs", overwrite=True)
    before = disk()
    with refused("differs is already there. Nothing is overwritten"):
        save(other, "differs", **given)
    assert disk() == before
    assert "Saved differs" in save(other, "differs", overwrite=True, **given)[1]


def test_one_number_anywhere_makes_another_student(student, save, comfyui, pack):
    """Of a WAN without a card too: every tensor is compared."""
    bare = made(comfyui, pack, "bare", None, seed=21)
    save(bare, "bare one")
    assert "was there already" in save(bare, "bare one")[1]
    module = pack("wanlite_model.transformer").WanLiteStudent.from_pretrained(bare.folder)
    with torch.no_grad():
        module.state_dict()["blocks.1.ffn.0.bias"][5] += 1
    module.save_pretrained(comfyui.base / "output" / "bare two")
    other = pack("wanlite_model.compress.handle").StudentHandle.of(comfyui.base / "output" / "bare two")
    assert "Saved bare one" in save(other, "bare one", overwrite=True)[1]


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors.index.json"])
def test_a_folder_that_lacks_what_a_reader_needs_is_written_again(name, student, save, comfyui):
    save(student, "lacking", overwrite=True)
    file = comfyui.base / "models/diffusion_models/lacking" / name
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = {**before, "dim": 1} if name == "config.json" else {}
    file.write_text(json.dumps({**changed, "_wanlite": before.get("_wanlite", {})}), encoding="utf-8")
    assert "Saved lacking" in save(student, "lacking", overwrite=True)[1]
    assert json.loads(file.read_text(encoding="utf-8")) == before


def test_a_workflow_that_was_changed_is_not_taken_for_the_students(student, save, comfyui, refused):
    save(student, "with workflow", "single file")
    workflow = comfyui.base / "output/wanlite/workflows/with workflow.workflow.json"
    written = json.loads(workflow.read_text(encoding="utf-8"))
    assert "was there already" in save(student, "with workflow", "single file")[1]
    workflow.write_text("{}", encoding="utf-8")
    with refused("with workflow.safetensors is already there"):
        save(student, "with workflow", "single file")
    assert "Saved" in save(student, "with workflow", "single file", overwrite=True)[1]
    assert json.loads(workflow.read_text(encoding="utf-8")) == written
