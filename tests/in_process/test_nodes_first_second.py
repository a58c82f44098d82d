"""A wrong wire is refused in the node's first second: nothing was loaded onto a device, and neither teacher, student nor VAE was asked."""
import time
from dataclasses import replace

import pytest
import torch
from helpers_bridge import TextEncoder, call, empty_latent, tree
from helpers_tiny import random_bank, random_wan
from PIL import Image
from safetensors.torch import save_file

LATENT = empty_latent(32, 32, 5)


def opened(wan):
    import comfy.sd
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(dict(wan.state_dict()), model_options={"dtype": torch.float32})


@pytest.fixture(scope="module")
def parts(comfyui, pack, tmp_path_factory, vae):
    """MODELs, students and VAEs of several kinds of WAN, and what is no WAN at all."""
    for used in ("training", "compare", "save", "loras", "text"):           # a node's first run imports the engine; ComfyUI's start does not
        pack(f"nodes.comfy_bridge.{used}")
    handle, plan = pack("wanlite_model.compress.handle").StudentHandle, pack("wanlite_model.compress.plan").CompressionPlan
    theirs = random_bank(3)
    bank = pack("wanlite_model.prompts").PromptBank(prompts=theirs.prompts, contexts=theirs.contexts, negative_text="", negative=theirs.negative)
    wans = {"t2v": random_wan(seed=11, depth=3, ffn_dim=128), "5B": random_wan(seed=12, depth=2, ffn_dim=128, model_type="ti2v", num_channels=48),
            "i2v": random_wan(seed=13, depth=2, ffn_dim=128, model_type="i2v", in_dim=36, image_dim=1280)}
    folder = tmp_path_factory.mktemp("first second")
    students = {kind: handle.of(wan.save_pretrained(folder / kind).path) for kind, wan in wans.items()}
    wide = type("Wide", (), {"latent_channels": 48, "decode": vae.decode, "encode": vae.encode})()
    pictures = comfyui.base / "input/first second"
    pictures.mkdir()
    Image.new("RGB", (32, 32)).save(pictures / "a.png")
    (pictures / "a.txt").write_text("a red ball", encoding="utf-8")
    loras = comfyui.base / "models/loras"
    loras.mkdir(exist_ok=True)
    files = {"first second": {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 2)}, "first second-wanlite": {"a": torch.ones(2)},
             "first second fits": {f"diffusion_model.blocks.3.self_attn.q.lora_{part}.weight": torch.ones(*shape)
                                   for part, shape in (("down", (2, 128)), ("up", (128, 2)))}}
    files["first second fits-wanlite"] = files["first second-wanlite"]
    for name, tensors in files.items():
        save_file(tensors, loras / f"{name}.safetensors")
    cut = replace(students["t2v"], plan=plan(keep=(0, 1, 3), ffn_dim=128, method="given", teacher_layers=4, teacher_ffn_dim=128))
    yield {"bank": bank, "cut student": cut, **{kind: opened(wan) for kind, wan in wans.items()},
           **{f"{kind} student": student for kind, student in students.items()}, "vae": vae, "vae of 48": wide, "no model": torch.nn.Linear(2, 2)}
    for name in files:
        (loras / f"{name}.safetensors").unlink()
    for path in pictures.iterdir():
        path.unlink()
    pictures.rmdir()


@pytest.fixture
def worked(pack, comfyui, monkeypatch):
    """What was asked of a model or of the device."""
    import comfy.model_base
    import comfy.model_management
    import comfy.sd
    calls = []
    places = [(comfy.model_base.BaseModel, "apply_model"), (comfy.sd.VAE, "decode"), (comfy.sd.VAE, "encode"), (comfy.model_management, "load_models_gpu"),
              (comfy.sd, "load_diffusion_model"), (pack("wanlite_model.transformer").WanLiteStudent, "forward")]
    for owner, name in places:
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: calls.append(name))
    return calls


DISTIL = {"student": "t2v student", "model": "t2v", "prompts": "bank", "latent": LATENT, "run_name": "first second"}
COMPARE = {"teacher": "t2v", "student": "t2v", "prompts": "bank", "vae": "vae", "latent": LATENT}
CREATE = {"model": "t2v", "prompts": "bank", "latent": LATENT}
PICTURES = {"clip": TextEncoder(), "folder": "first second", "latent": LATENT, "vae": "vae"}
WRONG = [
    ("Distill", {**DISTIL, "student": "5B student"}, "The student is a WAN ti2v .*and the teacher is t2v"),
    ("Distill", {**DISTIL, "model": "no model"}, "This MODEL is not a WAN: it is a Linear"),
    ("Distill", {**DISTIL, "vae": "vae of 48"}, "The VAE is for latents of 48 channels. This WAN's have 16"),
    ("Distill", {**DISTIL, "latent": empty_latent(channels=48)}, "The LATENT has 48 channels"),
    ("Distill", {**DISTIL, "student": "i2v student", "model": "i2v"}, "makes videos of pictures, and the prompts come with none"),
    ("Distill", {**DISTIL, "preset": "image"}, "The preset 'image' is for one frame"),
    ("Distill", {**DISTIL, "expert": "high noise", "other_expert": "t2v"}, "Both experts are the same weights"),
    ("Distill", {**DISTIL, "recipe": {"start_from": "first second.safetensors"}}, "is no LoRA for a WAN"),
    ("CreateStudent", {**CREATE, "model": "no model"}, "This MODEL is not a WAN"),
    ("CreateStudent", {**CREATE, "latent": empty_latent(channels=4)}, "The LATENT has 4 channels"),
    ("CreateStudent", {**CREATE, "model": "i2v"}, "the prompts come with none"),
    ("CreateStudent", {**CREATE, "preset": "custom", "depth": 9}, "The teacher has 3 blocks"),
    ("CreateStudent", {**CREATE, "expert": "low noise", "other_expert": "5B"}, "The experts differ in their architecture"),
    ("Compare", {**COMPARE, "student": "5B"}, "The student MODEL makes latents of 48 channels, and the teacher of 16"),
    ("Compare", {**COMPARE, "third": "i2v"}, "the prompts come with none"),
    ("Compare", {**COMPARE, "third": "no model"}, "This MODEL is not a WAN"),
    ("Compare", {**COMPARE, "vae": "vae of 48"}, "The VAE is for latents of 48 channels"),
    ("Compare", {**COMPARE, "latent": empty_latent(channels=48)}, "The LATENT has 48 channels"),
    ("Compare", {**COMPARE, "clips": 4}, "clips is 4 and there are 3 prompts"),
    ("SaveStudent", {"student": "t2v student", "name": "any", "format": "LoRA"}, "is not a LoRA over its teacher"),
    ("SaveStudent", {"student": "t2v student", "name": "first second taken"}, "holds notes.txt, which would be lost"),
    ("RemapLoRA", {"student": "t2v student", "lora": "first second.safetensors"}, "has all blocks and FFN neurons of its teacher"),
    ("RemapLoRA", {"student": "cut student", "lora": "first second.safetensors"}, "is no LoRA for the teacher of this student"),
    ("RemapLoRA", {"student": "cut student", "lora": "first second fits.safetensors", "overwrite": True}, "WanLite did not write it"),
    ("EncodePrompts", {"clip": TextEncoder(width=768), "prompts": "a cat"}, "The text embedding has shape"),
    ("EncodePrompts", {**PICTURES, "vae": "vae of 48"}, "The VAE is for latents of 48 channels"),
]


@pytest.mark.parametrize("name, given, words", WRONG, ids=[f"{name}: {words}" for name, _, words in WRONG])
def test_a_wrong_wire_is_refused_in_the_first_second_before_any_work(name, given, words, parts, worked, pack, comfyui, refused):
    module = {"Distill": "distill", "Compare": "compare", "EncodePrompts": "prompts", "RemapLoRA": "lora"}.get(name, "student")
    taken = comfyui.base / "models/diffusion_models/first second taken"
    taken.mkdir(exist_ok=True)
    (taken / "notes.txt").write_text("mine", encoding="utf-8")
    node = getattr(pack(f"nodes.{module}"), f"WanLite{name}")
    given = {key: parts[value] if isinstance(value, str) and value in parts else value for key, value in given.items()}
    before, begun = tree(comfyui.base / "models"), time.perf_counter()
    with refused(words):
        call(node, **given)
    assert time.perf_counter() - begun < 1 and not worked
    assert tree(comfyui.base / "models") == before
