"""The workflow that comes with a saved student, as a real server with stock nodes sees it."""
import json
import os
from dataclasses import replace

import pytest
from helpers_tiny import random_wan
from helpers_variants import RELEASED, TINY
from PIL import Image

from demo.comfy_server import ServerError
from demo.graph import to_api
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.workflow import PICTURE, stock_workflow
from wanlite_model.formats.write import write_student

CARD = StudentCard(sampler="lcm", scheduler="beta", steps=4, cfg=1.0, shift=5.5, size=(64, 48, 13))


def saved(base, name, card=CARD, kind="t2v", **options):
    student = random_wan(**{**TINY[kind], "depth": 1})
    return write_student(base / "models" / "diffusion_models" / name, config=student.wan, tensors=student.state_dict().items(), card=card, **options)


@pytest.mark.parametrize("frames", [1, 13])
@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_it_asks_for_nothing_but_the_text_encoder_and_the_vae(server, tmp_path, layout, frames):
    """Every node, widget value and connection is one the server takes; only two model files are not on this machine."""
    name = f"student {frames}" + ".safetensors" * (layout == "single file")
    report = saved(server.base, name, replace(CARD, size=(64, 48, frames)), layout=layout, workflow_folder=tmp_path)
    prompt = to_api(json.loads(report.workflow.read_text(encoding="utf-8")), server.object_info())
    of = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert of["UNETLoader"]["unet_name"] == (name if layout == "single file" else os.path.join(name, "diffusion_model.safetensors"))
    assert of["UNETLoader"]["unet_name"] in server.object_info()["UNETLoader"]["input"]["required"]["unet_name"][0]
    assert of["ModelSamplingSD3"]["shift"] == 5.5
    sampler = of["KSampler"]
    assert [sampler[key] for key in ("sampler_name", "scheduler", "steps", "cfg", "denoise")] == ["lcm", "beta", 4, 1.0, 1.0]
    assert prompt[sampler["model"][0]]["class_type"] == "ModelSamplingSD3"
    assert of["EmptyHunyuanLatentVideo"] == {"width": 64, "height": 48, "length": frames, "batch_size": 1}
    assert_missing(server, prompt, "umt5_xxl", "wan_2.1_vae")


def assert_missing(server, prompt, *files):
    """The server has nothing to say against this prompt but that these model files are not on this machine."""
    (server.base / "input").mkdir(exist_ok=True)
    Image.new("RGB", (32, 24)).save(server.base / "input" / PICTURE)        # ComfyUI brings its own, and not into a folder like this
    with pytest.raises(ServerError) as refused:
        server.queue(prompt)
    told = str(refused.value).splitlines()[1:]          # after the headline, one line a complaint
    assert len(told) == len(files) and all(any(file in line for line in told) for file in files), str(refused.value)


@pytest.mark.parametrize(("kind", "files"), [
    ("i2v 2.1", ["umt5_xxl", "wan_2.1_vae", "clip_vision_h"]), ("flf2v", ["umt5_xxl", "wan_2.1_vae", "clip_vision_h"]),
    ("i2v 2.2", ["umt5_xxl", "wan_2.1_vae"]), ("ti2v", ["umt5_xxl", "wan2.2_vae"]),
])
@pytest.mark.parametrize("picture", ["as saved", "switched on"])
def test_that_of_a_wan_with_pictures_asks_for_the_clip_vision_model_too_where_it_has_one(server, tmp_path, kind, files, picture):
    report = saved(server.base, f"{kind} {picture}.safetensors", kind=kind, layout="single file", workflow_folder=tmp_path)
    workflow = json.loads(report.workflow.read_text(encoding="utf-8"))
    if picture == "switched on":
        for node in workflow["nodes"]:
            node["mode"] = 0
    prompt = to_api(workflow, server.object_info())
    of = {node["class_type"]: node["inputs"] for node in prompt.values()}
    latent = next(of[name] for name in ("WanImageToVideo", "WanFirstLastFrameToVideo", "Wan22ImageToVideoLatent") if name in of)
    assert [latent[name] for name in ("width", "height", "length", "batch_size")] == [64, 48, 13, 1]
    for name, connected in latent.items():
        if isinstance(connected, list) and "image" in name:
            kinds = {prompt[connected[0]]["class_type"]}
            assert kinds == {"CLIPVisionEncode" if "clip" in name else "LoadImage"}
    assert ("start_image" in latent) is (kind != "ti2v" or picture == "switched on")
    assert_missing(server, prompt, *files)


@pytest.mark.parametrize(("kind", "side"), [("t2v 14B", "high"), ("i2v 2.2", "low")])
def test_that_of_an_expert_asks_for_the_other_one_too(server, kind, side):
    name = saved(server.base, f"expert {side}.safetensors", layout="single file").file.name
    workflow = stock_workflow(name, replace(CARD, expert=side, boundary=0.9), RELEASED[kind])
    prompt = to_api(workflow, server.object_info())
    assert sum(node["class_type"] == "KSamplerAdvanced" for node in prompt.values()) == 2
    assert_missing(server, prompt, "umt5_xxl", "wan_2.1_vae", "low_noise" if side == "high" else "high_noise")
