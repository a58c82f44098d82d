"""The shipped graphs fit the nodes as they are, and a real server runs them to their ends, with tiny WANs under the names of the real files."""
import json
import shutil

import pytest
import requests
import torch
from helpers_graph import nodes_in
from helpers_tiny import random_bank, random_wan
from helpers_variants import TINY as KINDS
from PIL import Image
from safetensors.torch import save_file

from demo.comfy_server import ServerError
from demo.downloads import I2V_HIGH, I2V_LOW, SPEED_LORA, T2V_1_3B, T2V_14B, TEXT_ENCODER, VAE
from demo.graph import to_api
from demo.measure import VAE as TINY_VAE
from demo.workflows import BANK, FEW_STEP, FOLDER, IMAGE, PAIR, PICTURES, REAL, SETTINGS, build
from wanlite_model.files import read_json
from wanlite_model.formats.workflow import NEGATIVE
from wanlite_model.prompts import PromptBank

ALL = pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
FILES = {"UNETLoader": "unet_name", "VAELoader": "vae_name", "CLIPLoader": "clip_name", "LoraLoaderModelOnly": "lora_name"}
TEXTS = ("prompt 0", "prompt 1")
STAND_INS = "stand-ins.safetensors"
MADE = {REAL: ["diffusion_models/wan2.1_1.3B_slim/diffusion_model.safetensors"], IMAGE: ["diffusion_models/wan2.1_1.3B_image/diffusion_model.safetensors"],
        FEW_STEP: ["loras/my_wan_4_steps.safetensors"],
        PAIR: [f"diffusion_models/wan2.2_i2v_{side}_noise_slim.safetensors" for side in ("high", "low")]}
SMALL = {"EmptyHunyuanLatentVideo": {"width": 32, "height": 32}, "WanLiteCreateStudent": {"method": "interleaved", "block_steps": 0},
         "WanLiteDistill": {"steps": 2}, "KSampler": {"steps": 2}, "KSamplerAdvanced": {"steps": 4},
         "WanLiteCompare": {"teacher_steps": 2, "student_steps": 2, "third_steps": 2, "clips": 1}}
TEACHER_STEPS = {REAL: 2, PAIR: 2, FEW_STEP: 4, IMAGE: 8}           # the fewest that the student's own go into


def test_the_template_browser_is_told_of_all_and_is_given_their_thumbnails(server):
    """By the addresses that its page asks for."""
    listed = requests.get(f"{server.url}/api/workflow_templates", timeout=60).json()
    assert sorted(listed["WanLite"]) == sorted(path.stem for path in SETTINGS)
    for name in listed["WanLite"]:
        picture = requests.get(f"{server.url}/api/workflow_templates/WanLite/{name}.jpg", timeout=60)
        assert picture.headers["Content-Type"] == "image/jpeg" and picture.content == (FOLDER / f"{name}.jpg").read_bytes()
        assert requests.get(f"{server.url}/api/workflow_templates/WanLite/{name}.json", timeout=60).json() == read_json(FOLDER / f"{name}.json")


@ALL
def test_the_file_is_what_the_command_writes_for_these_nodes(path, server):
    written = json.loads(json.dumps(build(SETTINGS[path], server.object_info())))
    assert _without_new_outputs(read_json(path)) == _without_new_outputs(written), "run python -m demo.workflows"


def _without_new_outputs(workflow):
    """Newer ComfyUIs hand on what PreviewAny and the savers show: outputs that no node here takes."""
    return {**workflow, "nodes": [{**node, "outputs": node["outputs"] if node["type"].startswith("WanLite") else
                                   [output for output in node["outputs"] if output["links"]]} for node in workflow["nodes"]]}


@ALL
def test_the_server_misses_nothing_but_model_files(path, server):
    workflow = read_json(path)
    prompt = to_api(workflow, server.object_info())
    assert {node["class_type"] for node in prompt.values()} == {node["type"] for node in workflow["nodes"]} - {"MarkdownNote"}
    assert _refused(server, prompt) == _absent(prompt)


def test_the_graph_of_two_experts_is_whole_with_the_low_one_and_the_sampler_muted(server):
    """The shorter job of its note."""
    workflow = read_json(PAIR)
    for group in workflow["groups"]:
        if "low noise" in group["title"] or group["title"].startswith("6"):
            for node in nodes_in(group, workflow):
                node["mode"] = 2
    prompt = to_api(workflow, server.object_info())
    assert sum(node["class_type"] == "WanLiteSaveStudent" for node in prompt.values()) == 1
    assert _refused(server, prompt) == _absent(prompt)


def _absent(prompt):
    return sum(node["class_type"] in FILES for node in prompt.values())


def _refused(server, prompt):
    """How many files the server has not got, and that it has nothing else against the graph."""
    for node in prompt.values():                # whatever other tests have put into this server's folders
        if name := FILES.get(node["class_type"]):
            node["inputs"][name] = "absent.safetensors"
        if node["class_type"] == "WanLiteRecipe":
            node["inputs"]["start_from"] = "none"           # the same LoRA; not every ComfyUI checks that a list has it
    with pytest.raises(ServerError) as refused:
        server.queue(prompt)
    complaints = [line for line in str(refused.value).splitlines()[1:] if f"input/{BANK} is not there" not in line and PICTURES not in line]
    assert all("absent.safetensors" in line for line in complaints), complaints
    return len(complaints)


@pytest.fixture(scope="module")
def stand_ins(server):
    """Tiny models of the right kinds under the names of the real files, the prompts' embeddings, and pictures with captions; taken away afterwards,
    since other tests count on the real files not being here.
    """
    models, given = server.base / "models", server.base / "input"
    paths = {file: models / "diffusion_models" / file for file in (T2V_1_3B, T2V_14B, I2V_HIGH, I2V_LOW)}
    paths |= {VAE: models / "vae" / VAE, SPEED_LORA: models / "loras" / SPEED_LORA, TEXT_ENCODER: models / "text_encoders" / TEXT_ENCODER,
              BANK: given / STAND_INS}
    for seed, (file, kind) in enumerate(((T2V_1_3B, "t2v"), (T2V_14B, "t2v"), (I2V_HIGH, "i2v 2.2"), (I2V_LOW, "i2v 2.2"))):
        save_file(dict(random_wan(seed, **{**KINDS[kind], "hidden_size": 128, "depth": 3}).state_dict()), paths[file])
    shutil.copyfile(TINY_VAE, paths[VAE])
    paths[SPEED_LORA].parent.mkdir(exist_ok=True)
    save_file({f"diffusion_model.blocks.{i}.self_attn.q.lora_{way}.weight": torch.randn(shape) * 0.01
               for i in range(3) for way, shape in (("down", (4, 128)), ("up", (128, 4)))}, paths[SPEED_LORA])
    save_file({"nothing": torch.zeros(1)}, paths[TEXT_ENCODER])         # listed, and never loaded: the bank knows all prompts
    encoded = random_bank(len(TEXTS) + 1)
    PromptBank(prompts=TEXTS, contexts=encoded.contexts[1:], negative_text=NEGATIVE, negative=encoded.contexts[0]).save(paths[BANK])
    (given / PICTURES).mkdir()
    for number, text in enumerate(TEXTS):
        Image.new("RGB", (80, 60), (number * 60, 90, 120)).save(given / PICTURES / f"{number}.png")
        (given / PICTURES / f"{number}.txt").write_text(text, encoding="utf-8")
    yield server.base
    shutil.rmtree(given / PICTURES)
    for path in paths.values():
        path.unlink()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_it_runs_to_its_end_and_saves_what_the_note_says(path, server, stand_ins):
    """Every node and link as shipped; what takes time is made short, and texts come from a bank in place of 6 GB of text encoder."""
    prompt = small(path, server.object_info())
    outputs = server.run(prompt)
    saved = [outputs[key]["text"][0] for key, node in prompt.items() if node["class_type"] == "WanLiteSaveStudent"]
    assert len(saved) == len(MADE[path]) and all("verified" in text for text in saved), saved
    assert all((stand_ins / "models" / name).is_file() for name in MADE[path])
    shown = [outputs[key]["images"] for key, node in prompt.items() if node["class_type"] in ("SaveImage", "SaveAnimatedWEBP")]
    assert shown and all(shown)


def small(path, object_info):
    """The shipped graph, shortened where its time goes. A recipe is added where it has none."""
    prompt = to_api(read_json(path), object_info)
    declared = object_info["WanLiteRecipe"]["input"]["required"]
    recipes = [key for key, node in prompt.items() if node["class_type"] == "WanLiteRecipe"] or ["recipe"]
    prompt.setdefault(recipes[0], {"class_type": "WanLiteRecipe", "inputs": {name: value[1]["default"] for name, value in declared.items()}})
    for node in prompt.values():
        inputs = node["inputs"]
        inputs |= SMALL.get(node["class_type"], {})
        if node["class_type"] == "WanLiteRecipe":
            inputs |= {"batch_size": 1, "evaluations": 1, "teacher_steps": TEACHER_STEPS[path]}
        if node["class_type"] == "WanLiteDistill":
            inputs["recipe"] = [recipes[0], 0]
        if node["class_type"] == "WanLiteEncodePrompts":
            inputs |= {"bank": f"input/{STAND_INS}", "prompts": "" if inputs["folder"] == PICTURES else "\n".join(TEXTS), "prompt_file": "none"}
        if node["class_type"] == "EmptyHunyuanLatentVideo":
            inputs["length"] = min(inputs["length"], 5)
    return prompt
