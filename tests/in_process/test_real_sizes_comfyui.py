"""In ComfyUI a student of real width is opened, saved and verified with one copy in memory, ComfyUI's, and an fp8 teacher is cut tensor by tensor."""
import json
import math
import shutil

import pytest
from helpers_memory import ROOM, WAN_1_3B, largest, linux_only, python, sparse_file

from wanlite_model.formats.keymap import key_map, wan_shapes

pytestmark = linux_only
CONFIG = WAN_1_3B.resized(num_layers=6, ffn_dim=WAN_1_3B.ffn_dim)
COPY = 2 * sum(map(math.prod, wan_shapes(CONFIG).values()))         # bytes of it in bf16
ANSWER = {"head.head.bias": [1.0] * 64}         # a WAN of zeros answers it everywhere, and nothing where its head is zero too

MEASURE = """
import gc
import importlib
import json
from pathlib import Path
import torch
from demo.comfy_path import import_pack, put_comfyui_first
put_comfyui_first(Path(sys.argv[1]))
import comfy.cli_args
comfy.cli_args.args.cpu = True
comfy.cli_args.args.base_directory = sys.argv[2]
import comfy.sd
from helpers_bridge import call, empty_latent
from helpers_memory import watched
from helpers_tiny import random_bank
pack, models = import_pack().__name__, Path(sys.argv[2]) / "models" / "diffusion_models"
student, opened = (importlib.import_module(f"{pack}.nodes.{name}") for name in ("student", "comfy_bridge.load"))
handle = importlib.import_module(f"{pack}.wanlite_model.compress.handle").StudentHandle.of(models / "student.safetensors")
with watched() as saving:
    report = call(student.WanLiteSaveStudent, student=handle, name="saved", format="folder", dtype="bf16", overwrite=False)[1]
with watched() as opening:
    model = opened.open_model(models / "in diffusers", dtype=torch.bfloat16)
del model
gc.collect()
with torch.inference_mode():            # as in a node: ComfyUI's quantised weights are of one mode or the other
    model = opened.open_model(models / "fp8.safetensors")
with watched() as cutting:
    call(student.WanLiteCreateStudent, model=model, prompts=random_bank(1), latent=empty_latent(), preset="same size", keep_map="")
print(json.dumps({"report": report, "saving": saving.peak, "opening": opening.peak, "cutting": cutting.peak}))
"""


@pytest.fixture(scope="module")
def measured(comfyui_folder, tmp_path_factory):
    """What Save Student said, and the bytes of memory that saving, opening and cutting took at most beyond what there was."""
    base = tmp_path_factory.mktemp("real sizes")
    models = base / "models" / "diffusion_models"
    (models / "in diffusers").mkdir(parents=True)
    shapes, names = wan_shapes(CONFIG), key_map("wan", "diffusers", CONFIG.num_layers)
    sparse_file(models / "student.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()}, ANSWER)
    sparse_file(models / "in diffusers" / "model.safetensors", {names[name]: ("BF16", shape) for name, shape in shapes.items()}, {})
    described = {"_class_name": "WanTransformer3DModel", **CONFIG.to_diffusers()}
    (models / "in diffusers" / "config.json").write_text(json.dumps(described), encoding="utf-8")
    quantised = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
    scales = {name.removesuffix("weight") + "scale_weight": ("F32", ()) for name in quantised}
    tensors = {name: ("F8_E4M3" if name in quantised else "F32", shape) for name, shape in shapes.items()}
    sparse_file(models / "fp8.safetensors", {**tensors, **scales, "scaled_fp8": ("F8_E4M3", (2,))}, dict.fromkeys(scales, 1.0))
    ended = python(MEASURE, comfyui_folder, base)
    shutil.rmtree(base)                         # pytest would keep the gigabytes of three runs
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_saving_and_verifying_holds_comfyuis_copy_alone(measured):
    assert "verified: ComfyUI's Load Diffusion Model" in measured["report"]
    assert measured["saving"] < 1.5 * COPY, measured


def test_a_folder_in_diffusers_names_is_opened_with_one_copy(measured):
    assert measured["opening"] < 1.5 * COPY, measured


def test_an_fp8_teacher_is_cut_with_a_few_of_its_tensors_unpacked(measured):
    """Unpacked as fp32, which is what a CPU computes in: as stored there, multiplied by its scale, as handed on, and the one before."""
    assert measured["cutting"] < 4 * largest(CONFIG, itemsize=4) + ROOM < COPY, measured
