"""Saving: the same bits in every layout, one tensor in memory at a time, and all or nothing on disk."""
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_disk import leave_room
from helpers_tiny import random_wan
from safetensors import safe_open
from safetensors.torch import save_file

from wanlite_model.errors import WanLiteError
from wanlite_model.formats import container, write
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.container import read_header
from wanlite_model.formats.place import STALE, check_name
from wanlite_model.formats.read import open_wan
from wanlite_model.formats.write import Verified, write_student
from wanlite_model.transformer import WanLiteStudent

CARD = StudentCard(steps=4, cfg=1.0, shift=5.0, teacher="WAN t2v, 12 blocks of 128", teacher_fingerprint="0a1b", keep=(0, 2, 5), ffn_dim=65,
                   recipe={"lr": 1e-4}, measured={"velocity_error": 0.01})
FILES = {"config.json", "diffusion_model.safetensors", "diffusion_pytorch_model.safetensors.index.json", "cats.workflow.json"}


@pytest.fixture(scope="module")
def student():
    return random_wan(depth=3, ffn_dim=65)


def save(student, destination, **options):
    return write_student(destination, config=student.wan, tensors=student.state_dict().items(), **options)


def on_disk(root):
    """Everything below, hidden or not: {path: content}."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def equal(path, state):
    with open_wan(path) as source:
        found = dict(source.tensors())
    return found.keys() == state.keys() and all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
                                                for name, tensor in state.items())


# --- what is written

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_module_is_saved_bit_for_bit_in_its_own_dtype(student, models, dtype):
    module = random_wan(depth=2, ffn_dim=65).to(dtype)
    module.save_pretrained(models / "cats")
    assert equal(models / "cats", module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(WanLiteStudent.from_pretrained(models / "cats").state_dict().values(), module.state_dict().values()))


def test_dtype_rounds_as_torch_does_and_halves_the_file(student, models):
    whole, half = save(student, models / "cats"), save(student, models / "dogs", dtype=torch.bfloat16)
    assert equal(half.path, {name: tensor.bfloat16() for name, tensor in student.state_dict().items()})
    assert whole.bytes == 2 * half.bytes == sum(4 * tensor.numel() for tensor in student.state_dict().values())


def test_tensors_come_in_any_order_dtype_and_memory_layout(student, models):
    state = {name: tensor.bfloat16() if i % 2 else tensor for i, (name, tensor) in enumerate(student.state_dict().items())}
    state["text_embedding.0.weight"] = state["text_embedding.0.weight"].T.contiguous().T
    report = write_student(models / "cats", config=student.wan, tensors=reversed(state.items()))
    assert equal(report.path, state)
    with safe_open(report.file, framework="pt") as reference:       # the library readers use, which needs aligned tensors
        assert all(torch.equal(reference.get_tensor(name), tensor) for name, tensor in state.items())


def test_the_folder_is_complete_and_its_index_names_every_tensor(student, models):
    report = save(student, models / "cats", card=CARD, legacy={"projection_factor": 2.0}, image_size=256)
    assert {path.name for path in report.path.iterdir()} == FILES
    index = json.loads((report.path / "diffusion_pytorch_model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index == {"metadata": {"total_size": report.bytes}, "weight_map": dict.fromkeys(student.state_dict(), "diffusion_model.safetensors")}
    config = json.loads((report.path / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] == "WanModel" and config["image_size"] == 256 and config["projection_factor"] == 1.0
    assert config["_wanlite"]["legacy"] == {"projection_factor": 2.0} and config["_wanlite"]["keep"] == [0, 2, 5]
    with open_wan(report.path) as from_folder, open_wan(report.file) as from_file:
        assert from_folder.card == from_file.card == CARD
        assert from_folder.provenance == from_file.provenance
        assert from_file.metadata["format"] == "pt" and "config" not in from_file.metadata


def test_loading_remembers_image_size_and_legacy_values(models):
    old = {"hidden_size": 128, "depth": 1, "image_size": 256, "projection_factor": 2.0, "text_max_length": 77}
    WanLiteStudent(old).save_pretrained(models / "cats")
    opened = WanLiteStudent.from_pretrained(models / "cats")
    assert opened.config["image_size"] == 256
    assert opened.legacy == {"projection_factor": 2.0, "text_max_length": 77}


def test_a_single_file_stands_alone_and_its_workflow_goes_where_the_caller_says(student, models, tmp_path):
    save(student, models / "cats.safetensors", layout="single file", card=CARD)
    assert on_disk(tmp_path).keys() == {"models", "models/diffusion_models", "models/diffusion_models/cats.safetensors"}
    report = save(student, models / "dogs.safetensors", layout="single file", card=CARD, workflow_folder=tmp_path / "user" / "workflows")
    assert {path.name for path in models.iterdir()} == {"cats.safetensors", "dogs.safetensors"}
    assert report.workflow == tmp_path / "user" / "workflows" / "dogs.workflow.json" and report.workflow.is_file()
    assert "dogs.safetensors" in report.workflow.read_text(encoding="utf-8")
    assert equal(report.path, student.state_dict())
    with open_wan(report.path) as source:
        assert source.card == CARD


def test_nothing_that_is_shared_tells_where_or_by_whom_it_was_made(student, models, tmp_path):
    report = save(student, models / "cats", card=CARD, image_size=256)
    with open_wan(report.file) as source:
        told = json.dumps(source.metadata) + "".join(path.read_text(encoding="utf-8") for path in report.path.glob("*.json"))
    for private in (str(tmp_path), str(Path.home()), "models", os.sep + "tmp", "prompt 0"):
        assert private not in told


@pytest.mark.parametrize("change", [{"teacher": "/home/me/wan.safetensors"}, {"teacher": "C:\\wan"}, {"teacher_fingerprint": "me@home"},
                                    {"recipe": {"prompt": "a cat"}}, {"measured": {"error": float("nan")}}, {"sampler": "../euler"},
                                    {"steps": 0}, {"steps": 4.0}, {"keep": (0, -1)}, {"ffn_kept": ("a cat",)}, {"ffn_kept": ("/home/me",), "keep": (0,), "ffn_dim": 20}, {"size": (64, 64)}, {"cfg": "1"},
                                    {"steps": 10**400}, {"cfg": 10**400}, {"recipe": {"error": float("nan")}, "measured": {"error": 0.1}}])
def test_a_card_has_no_room_for_a_path_a_name_or_a_prompt(change):
    with pytest.raises(WanLiteError, match="card has a wrong"):
        StudentCard(**change)


# --- how it is verified

def test_the_verifier_opens_the_new_file_before_it_is_in_place(student, models):
    seen = []

    def verify(path):
        seen.append((equal(path, student.state_dict()), path.suffix, any(models.iterdir())))
        return Verified(reader="ComfyUI", difference=2e-7)

    report = save(student, models / "cats", verify=verify)
    assert seen == [(True, ".safetensors", False)]
    assert report.verified.difference == 2e-7 and "verified: ComfyUI opened it" in report.sentence and "2.0e-07" in report.sentence


def test_a_save_is_called_verified_only_when_it_was(student, models):
    assert "not verified" in save(student, models / "cats").sentence
    report = save(student, models / "dogs", verify=lambda path: Verified(reader="ComfyUI", difference=None, why="no memory was free."))
    assert "not verified: no memory was free." in report.sentence


def test_what_a_node_holds_can_be_saved(models):
    """Nodes run in inference mode: what is made there are inference tensors, before the save or during it."""
    with torch.inference_mode():
        student = random_wan(depth=1, ffn_dim=65)
        save(student, models / "cats")
    save(student, models / "dogs", dtype=torch.bfloat16)
    assert equal(models / "cats", student.state_dict())


# --- all or nothing

def bad(name):
    """state_dict().items() with one fault in it."""
    def items(student):
        state = {key: tensor.clone() for key, tensor in student.state_dict().items()}
        if name == "nan":
            state["blocks.2.ffn.0.bias"][3] = float("nan")
        elif name == "shape":
            state["blocks.1.ffn.0.weight"] = torch.zeros(66, 128)
        elif name == "missing":
            del state["head.head.bias"]
        elif name == "unknown":
            state["blocks.3.norm3.bias"] = torch.zeros(128)
        elif name == "large":
            state["blocks.0.norm3.bias"][0] = 1e6
        return [*state.items(), *([("head.head.bias", state["head.head.bias"])] if name == "twice" else [])]
    return items


@pytest.mark.parametrize("fault, told", [
    ("nan", "'blocks.2.ffn.0.bias' holds a value that is not finite"), ("shape", r"shape \[66, 128\] is expected with shape \[65, 128\]"),
    ("missing", "'head.head.bias' was never given"), ("unknown", "'blocks.3.norm3.bias'.*not a tensor of this WAN"), ("twice", "written twice"),
    ("large", "reaches 1e.06, which float16 cannot hold")])
@pytest.mark.parametrize("taken", [False, True])
def test_weights_that_are_no_wan_change_nothing_on_disk(student, models, tmp_path, fault, told, taken):
    if taken:
        save(student, models / "cats")
    before = on_disk(tmp_path)
    with pytest.raises(WanLiteError, match=told):
        write_student(models / "cats", config=student.wan, tensors=bad(fault)(student), dtype=torch.float16, overwrite=taken)
    assert on_disk(tmp_path) == before


@pytest.mark.parametrize("room", [0, 10_000, 4_000_000])
@pytest.mark.parametrize("layout, name", [("folder", "cats"), ("single file", "cats.safetensors")])
def test_a_disk_that_becomes_full_changes_nothing(student, models, tmp_path, monkeypatch, layout, name, room):
    save(student, models / name, layout=layout)
    before = on_disk(tmp_path)
    leave_room(monkeypatch, room)
    for destination in (models / name, models / f"new {name}"):
        with pytest.raises(WanLiteError, match="disk became full while .*Nothing was saved and nothing was changed"):
            save(student, destination, layout=layout, overwrite=True)
    assert on_disk(tmp_path) == before


@pytest.mark.parametrize("late", ["sync", "json"])
def test_a_disk_that_tells_late_that_it_is_full_changes_nothing(student, models, tmp_path, monkeypatch, late):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((container.os, "fsync") if late == "sync" else (Path, "write_text")), refuse)
    before = on_disk(tmp_path)
    with pytest.raises(WanLiteError, match="disk became full"):
        save(student, models / "cats")
    assert on_disk(tmp_path) == before


def test_a_verifier_that_refuses_changes_nothing(student, models, tmp_path):
    def verify(path):
        raise WanLiteError("ComfyUI opens it as another model.")

    save(student, models / "cats")
    before = on_disk(tmp_path)
    for name in ("cats", "dogs"):
        with pytest.raises(WanLiteError, match="another model"):
            save(student, models / name, overwrite=True, verify=verify)
    assert on_disk(tmp_path) == before


@pytest.mark.parametrize("name", ["../cats", "a/b", "a\\b", "..", ".", "", " ", "cats ", " cats", "cats.", ".cats", "a:b", "a*b", 'a"b', "a<b", "a|b",
                                  "a?b", "a\nb", "a\0b", "con", "NUL", "com1", "lpt9.cats", "Aux.safetensors", "x" * 201, "猫" * 67])
def test_a_name_that_some_system_cannot_have_is_refused(name):
    with pytest.raises(WanLiteError, match="cannot be a student's name"):
        check_name(name)


@pytest.mark.parametrize("name", ["cats", "cats-4steps", "WAN 1.3B, 20 blocks (v2)", "猫", "console", "x" * 200])
def test_an_ordinary_name_is_taken_as_it_is(name):
    assert check_name(name) == name


def test_a_wrong_name_changes_nothing(student, models, tmp_path):
    before = on_disk(tmp_path)
    for name, layout in (("a:b", "folder"), ("con.safetensors", "single file"), ("cats.ckpt", "single file"), ("cats", "single")):
        with pytest.raises(WanLiteError):
            save(student, models / name, layout=layout)
    assert on_disk(tmp_path) == before


# --- overwriting

@pytest.mark.parametrize("layout, name", [("folder", "cats"), ("single file", "cats.safetensors")])
def test_a_taken_name_is_refused_unless_overwriting_is_asked_for(student, models, tmp_path, layout, name):
    workflows = tmp_path / "workflows"
    save(student, models / name, layout=layout, workflow_folder=workflows)
    before, other = on_disk(tmp_path), random_wan(seed=9, depth=2)
    with pytest.raises(WanLiteError, match="already there.*turn overwrite on"):
        save(other, models / name, layout=layout, workflow_folder=workflows)
    assert on_disk(tmp_path) == before
    save(other, models / name, layout=layout, workflow_folder=workflows, overwrite=True)
    assert equal(models / name, other.state_dict())
    assert on_disk(tmp_path).keys() == before.keys()            # the old one and every temporary file are gone


def test_an_empty_folder_is_as_good_as_none(student, models):
    (models / "cats").mkdir()
    assert equal(save(student, models / "cats").path, student.state_dict())


def test_a_folder_with_somebodys_files_is_never_overwritten(student, models, tmp_path):
    save(student, models / "cats")
    (models / "cats" / "notes.txt").write_text("mine", encoding="utf-8")
    (models / "dogs.safetensors").mkdir()
    before = on_disk(tmp_path)
    for name, layout in (("cats", "folder"), ("dogs.safetensors", "single file")):
        with pytest.raises(WanLiteError, match="would be lost"):
            save(student, models / name, layout=layout, overwrite=True)
    assert on_disk(tmp_path) == before


@pytest.mark.parametrize("layout, name", [("folder", "cats"), ("single file", "cats.safetensors")])
def test_a_model_that_wanlite_did_not_write_is_never_overwritten(student, models, tmp_path, layout, name):
    theirs = models / name / "diffusion_model.safetensors" if layout == "folder" else models / name
    theirs.parent.mkdir(exist_ok=True)
    save_file(student.state_dict(), theirs, metadata={"format": "pt"})
    if layout == "folder":
        (models / name / "config.json").write_text(json.dumps(student.wan.to_json()), encoding="utf-8")
    before = on_disk(tmp_path)
    with pytest.raises(WanLiteError, match="did not write it"):
        save(student, models / name, layout=layout, overwrite=True)
    assert on_disk(tmp_path) == before


def test_a_card_survives_loading_and_saving_again(student, models):
    save(student, models / "cats", card=StudentCard(steps=4, cfg=1.0, shift=3.0))
    loaded = WanLiteStudent.from_pretrained(models / "cats")
    loaded.save_pretrained(models / "cats", overwrite=True)
    with open_wan(models / "cats") as source:
        assert source.card == StudentCard(steps=4, cfg=1.0, shift=3.0)
    workflow = (models / "cats" / "cats.workflow.json").read_text(encoding="utf-8")
    sampler = next(node for node in json.loads(workflow)["nodes"] if node["type"] == "KSampler")
    assert sampler["widgets_values"][2:4] == [4, 1.0]


def test_an_old_file_that_cannot_be_removed_does_not_undo_the_new_one(student, models, monkeypatch):
    save(student, models / "cats.safetensors", layout="single file")
    unlink = Path.unlink

    def held(self, missing_ok=False):
        if self.name.endswith(".old"):
            raise PermissionError(13, "in use")
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", held)
    other = random_wan(depth=2, ffn_dim=65)
    save(other, models / "cats.safetensors", layout="single file", overwrite=True)
    assert equal(models / "cats.safetensors", other.state_dict())


def test_a_student_can_replace_the_folder_it_was_read_from(student, models):
    save(student, models / "cats")
    opened = WanLiteStudent.from_pretrained(models / "cats")
    with torch.no_grad():
        opened.head.head.bias.add_(1)
    opened.save_pretrained(models / "cats", overwrite=True)
    assert equal(models / "cats", opened.state_dict()) and not equal(models / "cats", student.state_dict())


def on_windows(monkeypatch, in_use=None):
    """Windows' rules: no rename onto something, none of a file (or of its folder) that somebody has mapped."""
    rename = os.rename

    def strict(source, goal):
        if Path(goal).exists() or (in_use and in_use.is_relative_to(Path(source))):
            raise PermissionError(errno.EACCES, "Access is denied")
        rename(source, goal)

    monkeypatch.setattr(os, "rename", strict)
    monkeypatch.setattr(os, "replace", strict)


@pytest.mark.parametrize("layout, name", [("folder", "cats"), ("single file", "cats.safetensors")])
def test_overwriting_works_where_nothing_can_be_renamed_over(student, models, tmp_path, monkeypatch, layout, name):
    save(student, models / name, layout=layout, workflow_folder=tmp_path / "workflows")
    on_windows(monkeypatch)
    other = random_wan(seed=9, depth=2)
    save(other, models / name, layout=layout, workflow_folder=tmp_path / "workflows", overwrite=True)
    assert equal(models / name, other.state_dict())


@pytest.mark.parametrize("layout, name, used", [("folder", "cats", "cats/diffusion_model.safetensors"), ("single file", "cats.safetensors", "cats.safetensors")])
def test_a_file_that_a_model_has_mapped_is_left_alone_in_a_sentence(student, models, tmp_path, monkeypatch, layout, name, used):
    save(student, models / name, layout=layout, workflow_folder=tmp_path / "workflows")
    before = on_disk(tmp_path)
    on_windows(monkeypatch, in_use=models / used)
    with pytest.raises(WanLiteError, match="in use on Windows. Unload it"):
        save(student, models / name, layout=layout, workflow_folder=tmp_path / "workflows", overwrite=True)
    assert on_disk(tmp_path) == before


def test_a_last_move_that_fails_puts_the_old_model_and_workflow_back(student, models, tmp_path, monkeypatch):
    workflows = tmp_path / "workflows"
    save(student, models / "cats.safetensors", layout="single file", workflow_folder=workflows)
    before = on_disk(tmp_path)
    on_windows(monkeypatch, in_use=workflows / "cats.workflow.json")        # moved after the model
    with pytest.raises(WanLiteError):
        save(random_wan(seed=9, depth=2), models / "cats.safetensors", layout="single file", workflow_folder=workflows, overwrite=True)
    assert on_disk(tmp_path) == before


@pytest.mark.parametrize("layout, name", [("folder", "cats"), ("single file", "cats.safetensors")])
def test_what_cannot_even_be_moved_back_is_kept(student, models, monkeypatch, layout, name):
    """The worst case: the disk takes the first move and none after it. The old student is then in the hidden folder, whole."""
    save(student, models / name, layout=layout)
    rename, moved = os.rename, []

    def once(source, goal):
        if moved:
            raise OSError(errno.EIO, "Input/output error")
        if Path(source) == models / name:
            moved.append(Path(goal))
        rename(source, goal)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(WanLiteError, match="Nothing is lost: it is in"):
        save(random_wan(seed=9, depth=2), models / name, layout=layout, overwrite=True)
    old = moved[0] / "diffusion_model.safetensors" if layout == "folder" else moved[0]
    assert read_header(old).entries.keys() == student.state_dict().keys()


def test_no_unfinished_file_is_where_comfyui_looks(student, models, monkeypatch):
    """Neither while it is streamed, nor, where the folder above cannot be written to, under a name that a loader lists."""
    seen = []

    def items():
        for item in student.state_dict().items():
            seen.append([path for path in models.rglob("*.safetensors")])
            yield item

    write_student(models / "cats", config=student.wan, tensors=items())
    make = Path.mkdir

    def refuse_above(path, *args, **kwargs):
        if path.parent == models.parent and path != models:
            raise PermissionError(errno.EACCES, "Permission denied")
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse_above)
    write_student(models / "dogs", config=student.wan, tensors=items())
    assert {len(paths) for paths in seen[:len(seen) // 2]} == {0} and {len(paths) for paths in seen[len(seen) // 2:]} == {1}
    assert {path.name for path in models.iterdir()} == {"cats", "dogs"}


def test_what_a_killed_process_left_is_swept_but_never_a_student_that_was_moved_aside(student, models):
    for name in ("fresh", "stale", "aside"):
        left = models.parent / f".wanlite-tmp-{name}"
        (left / ("cats.old" if name == "aside" else "cats")).mkdir(parents=True)
        if name != "fresh":
            os.utime(left, (time.time() - STALE - 60,) * 2)
    save(student, models / "cats")
    assert {path.name for path in models.parent.glob(".wanlite-tmp-*")} == {".wanlite-tmp-fresh", ".wanlite-tmp-aside"}


# --- memory

MEASURE = """
import sys
from pathlib import Path
import torch
from wanlite_model.config import WanConfig
from wanlite_model.formats.keymap import wan_shapes
from wanlite_model.formats.write import write_student
from wanlite_model.formats.read import open_wan

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def save(name, layers, dtype):
    config = WanConfig(dim=512, ffn_dim=8192, num_layers=layers)
    lazy = ((key, torch.ones(shape)) for key, shape in wan_shapes(config).items())
    return write_student(Path(sys.argv[1]) / "models" / "all" / name, config=config, tensors=lazy, dtype=dtype)

save("small", 1, torch.float32)                     # imports and pools are paid for
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")       # the peak starts again from here
first = save("large", 4, torch.float32)
with open_wan(first.file) as source:                # and once more from disk to disk, as another dtype
    second = write_student(first.path.with_name("again"), config=source.config, tensors=source.tensors(), dtype=torch.bfloat16)
print(first.bytes, second.bytes, max(4 * torch.Size(shape).numel() for shape in wan_shapes(source.config).values()), memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_saving_takes_the_largest_tensor_or_a_tenth_of_the_model_of_extra_memory(tmp_path):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}       # freed memory goes back at once
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, env=environment,
                          cwd=Path(write.__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stderr
    size, rounded, largest, extra = map(int, done.stdout.split())
    assert rounded == size // 2 and size > 10 * largest
    assert extra <= max(0.1 * size, largest) + 10e6 < 2 * largest, f"{extra / 2**20:.1f} MiB"      # 10 MB: chunks, header, allocator
