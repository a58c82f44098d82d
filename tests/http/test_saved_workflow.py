"""The workflow that comes with a saved student, as a real server with stock nodes sees it."""
import json
import os
from dataclasses import replace

import pytest
from helpers_tiny import random_wan

from demo.comfy_server import ServerError
from demo.graph import to_api
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.write import write_student

CARD = StudentCard(sampler="lcm", scheduler="beta", steps=4, cfg=1.0, shift=5.5, size=(64, 48, 13))


def saved(base, name, card=CARD, **options):
    student = random_wan(depth=1)
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
    with pytest.raises(ServerError) as refused:
        server.queue(prompt)
    told = str(refused.value).splitlines()[1:]          # after the headline, one line a complaint
    assert len(told) == 2 and "umt5_xxl" in str(told) and "wan_2.1_vae" in str(told), str(refused.value)
