"""What widgets alone decide, through ComfyUI's own validation of a queued graph: refused before the queue, on the node that is wrong, in one sentence."""
import asyncio
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers_tiny import random_bank, random_wan
from PIL import Image
from safetensors.torch import save_file

TYPES = ("MODEL", "CLIP", "VAE", "LATENT", "CONDITIONING", "SIGMAS", "IMAGE", "STRING", "INT", "WANLITE_STUDENT", "WANLITE_PROMPTS", "WANLITE_RECIPE")


class Everything:
    """Something to link each input to."""
    RETURN_TYPES, FUNCTION = TYPES, "give"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}


class Shown:
    """Makes a graph of nodes that are no output themselves."""
    RETURN_TYPES, OUTPUT_NODE, FUNCTION = (), True, "show"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"any": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True


def linked(type_):
    return ["everything", TYPES.index(type_)]


@pytest.fixture(scope="module")
def placed(comfyui):
    """What is on disk while the tests of this file run."""
    models, loras, inputs = (comfyui.base / name for name in ("models/diffusion_models", "models/loras", "input"))
    loras.mkdir(exist_ok=True)
    random_wan(seed=5, depth=2, ffn_dim=128).save_pretrained(models / "taken student")
    (models / "foreign").mkdir()
    (models / "foreign" / "notes.txt").write_text("mine", encoding="utf-8")
    for name in ("foreign.safetensors", "style.safetensors", "style-b.safetensors"):
        save_file({"any.weight": torch.zeros(2)}, (loras if name.startswith("style") else models) / name)
    workflow = comfyui.base / "output/wanlite/workflows/graph taken.workflow.json"
    workflow.parent.mkdir(parents=True, exist_ok=True)
    workflow.write_text("{}", encoding="utf-8")
    random_bank(3).save(inputs / "three prompts.safetensors")
    banks = comfyui.base / "output/wanlite/prompts"
    banks.mkdir(parents=True, exist_ok=True)
    random_bank(2).save(banks / "bank taken.safetensors")
    (inputs / "with captions").mkdir()
    Image.new("RGB", (8, 8)).save(inputs / "with captions" / "a.png")
    (inputs / "with captions" / "a.txt").write_text("a red ball", encoding="utf-8")
    yield
    for left in (models / "taken student", models / "foreign", models / "foreign.safetensors", models / "queued twice.safetensors", workflow,
                 inputs / "with captions", inputs / "three prompts.safetensors", banks / "bank taken.safetensors", loras / "style.safetensors",
                 loras / "style-b.safetensors"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@pytest.fixture
def validated(placed, comfyui, pack, monkeypatch):
    """The answer of ComfyUI's validation to a graph of one node of ours: its default widgets and all required links, changed as given; NONE is left open."""
    import execution
    ours = {node.GET_SCHEMA().node_id: node for node in asyncio.run(pack("nodes").WanLiteExtension().get_node_list())}
    for name, node in {**ours, "Everything": Everything, "Shown": Shown}.items():
        monkeypatch.setitem(comfyui.nodes.NODE_CLASS_MAPPINGS, name, node)

    def answer(name, /, **given):
        inputs = {}
        for one in ours[f"WanLite{name}"].GET_SCHEMA().inputs:
            if getattr(one, "default", None) is not None:
                inputs[one.id] = one.default
            elif one.io_type in TYPES and not one.optional:
                inputs[one.id] = linked(one.io_type)
        prompt = {"everything": {"class_type": "Everything", "inputs": {}}, "shown": {"class_type": "Shown", "inputs": {"any": ["ours", 0]}},
                  "ours": {"class_type": f"WanLite{name}", "inputs": {**inputs, **given}}}
        valid, _, _, errors = asyncio.run(execution.validate_prompt("id", prompt, None))
        return SimpleNamespace(valid=valid, wrong=list(errors), told=[error["details"] for one in errors.values() for error in one["errors"]])
    return answer


MODEL, CLIP, VAE, LATENT, CONDITIONING, TEXT, RECIPE = (linked(name) for name in ("MODEL", "CLIP", "VAE", "LATENT", "CONDITIONING", "STRING", "WANLITE_RECIPE"))
BANK = "input/three prompts.safetensors"
REFUSED = [
    ("LoadTeacher", {"name": "gone.safetensors"}, "gone.safetensors is not in ComfyUI's model folders any more"),
    ("LoadStudent", {"name": "gone/"}, "gone/ is not in ComfyUI's model folders any more"),
    ("EncodePrompts", {"clip": CLIP}, "There are no prompts"),
    ("EncodePrompts", {"clip": CLIP, "prompts": "# only a remark\n\n"}, "There are no prompts"),
    ("EncodePrompts", {"prompts": "a cat"}, "2 texts are in no bank (first: 'a cat') and no CLIP is connected"),
    ("EncodePrompts", {"prompts": "prompt 1\na cat", "bank": BANK}, "1 texts are in no bank (first: 'a cat')"),
    ("EncodePrompts", {"clip": CLIP, "prompts": "a cat\na dog", "preview": 3}, "preview is 3 and there are 2 prompts"),
    ("EncodePrompts", {"bank": BANK, "preview": 4}, "preview is 4 and there are 3 prompts"),
    ("EncodePrompts", {"clip": CLIP, "prompts": "a cat", "template": "ohwx style"}, "has no {prompt} in it"),
    ("EncodePrompts", {"bank": "gone.safetensors"}, "gone.safetensors is not there any more"),
    ("EncodePrompts", {"bank": BANK, "prompt_file": "gone.txt"}, "gone.txt is not there any more"),
    ("EncodePrompts", {"bank": BANK, "folder": "gone"}, "gone is not there any more"),
    ("EncodePrompts", {"clip": CLIP, "folder": "with captions", "prompts": "a cat"}, "There are prompts, and a folder whose captions are prompts"),
    ("EncodePrompts", {"clip": CLIP, "folder": "with captions", "latent": LATENT}, "WAN's VAE is not connected"),
    ("EncodePrompts", {"bank": BANK, "show": "all of it"}, "show is 'all of it', which is not offered"),
    *(("EncodePrompts", {"bank": BANK, "save_as": name}, "cannot be a bank's name") for name in ("../up", "a/b", "a\\b", "CON", "dot.")),
    ("EncodePrompts", {"bank": BANK, "save_as": "bank taken"}, "A bank named bank taken is already there"),
    ("EncodePrompts", {"conditioning": CONDITIONING, "negative_conditioning": CONDITIONING, "prompts": "a cat"}, "there are prompts beside it"),
    ("EncodePrompts", {"conditioning": CONDITIONING}, "and the negative one is not"),
    ("CreateStudent", {"depth": 4}, "The preset '2/3 of the blocks' decides the size"),
    ("CreateStudent", {"preset": "most of it"}, "preset is 'most of it', which is not offered"),
    ("CreateStudent", {"preset": "custom", "keep_map": "0-3;5"}, "The keep-map has '0-3;5' in it"),
    ("CreateStudent", {"preset": "custom", "keep_map": "5-3"}, "A range runs upwards"),
    ("CreateStudent", {"preset": "custom", "keep_map": "3,2"}, "Blocks keep the teacher's order"),
    ("CreateStudent", {"preset": "custom", "keep_map": "0-2000"}, "No WAN has more than 1000 blocks"),
    ("CreateStudent", {"preset": "custom", "keep_map": "0-3", "depth": 5}, "depth is 5, and the keep-map names 4 blocks"),
    ("CreateStudent", {"preset": "custom", "ffn_dim": -1}, "ffn_dim is -1. Set it between 0 and"),
    ("CreateStudent", {"expert": "high noise"}, "Connect the MODEL of the expert of low noise"),
    ("CreateStudent", {"other_expert": MODEL}, "A second expert is connected, and 'not one of two' is chosen"),
    ("Recipe", {"objective": "distribution", "rank": 0}, "The student and its critic are adapters"),
    ("Recipe", {"objective": "distribution", "own_states": 0.5}, "own_states is 0.5 and objective is 'distribution'"),
    ("Recipe", {"objective": "trajectory", "renoised": 0.7}, "That objective makes no use of renoised"),
    ("Recipe", {"objective": "velocity", "student_steps": 4}, "Set student_steps to 0, or choose another objective"),
    ("Recipe", {"objective": "likeness"}, "objective is 'likeness', which is not offered"),
    ("Recipe", {"rank": 0, "frozen_float8": "on"}, "frozen_float8 is on and rank is 0"),
    ("Recipe", {"rank": 0, "swapped_blocks": 4}, "swapped_blocks is 4 and rank is 0"),
    ("Recipe", {"rank": 32, "optimizer_8bit": "on"}, "optimizer_8bit is on and rank is 32"),
    ("Recipe", {"rank": 32, "optimizer": "Muon"}, "Adapters take AdamW"),
    ("Recipe", {"checkpointing": "off", "checkpoints_on_cpu": "on"}, "checkpoints_on_cpu is on and checkpointing is off"),
    ("Recipe", {"optimizer_8bit": "off", "gradient_release": "on"}, "gradient_release is on and optimizer_8bit is off"),
    ("Recipe", {"ema_decay": -0.5}, "ema_decay is -0.5. It must lie between 0 and 0.99999"),
    ("Recipe", {"learning_rate": 1e-9}, "learning_rate is 1e-09. It must lie between"),
    ("Recipe", {"gpu_gib": -1.0}, "gpu_gib is -1"),
    ("Recipe", {"start_from": "gone.safetensors"}, "gone.safetensors is not in ComfyUI's LoRA folders any more"),
    *(("Distill", {"run_name": name}, "cannot be a run's name") for name in ("..", "a/b", "a\\b", "", "aux")),
    ("Distill", {"preset": "few-step 3"}, "preset is 'few-step 3', which is not offered"),
    ("Distill", {"minutes": -1.0}, "minutes is -1. Set it between 0 and 43200"),
    ("Distill", {"cfg": 0.5}, "cfg is 0.5. Set it between 1 and 30"),
    ("Distill", {"expert": "low noise"}, "Connect the MODEL of the expert of high noise"),
    ("Distill", {"expert": "low noise, at every level", "other_expert": MODEL}, "A second expert is connected"),
    *(("SaveStudent", {"name": name}, "cannot be a student's name") for name in ("", "../up", "a/b", "a\\b", "NUL", "dot.", "a:b")),
    ("SaveStudent", {"dtype": "fp8"}, "A folder in fp8 is not written. fp8 is for ComfyUI"),
    ("SaveStudent", {"format": "single file", "dtype": "Q4_0"}, "Choose the format 'GGUF'"),
    ("SaveStudent", {"format": "GGUF"}, "Choose Q8_0, Q5_0 or Q4_0"),
    ("SaveStudent", {"format": "LoRA", "dtype": "fp8"}, "A LoRA in fp8 is not written"),
    ("SaveStudent", {"base_model": "/home/me/wan"}, "which is no name"),
    ("SaveStudent", {"licence": "a/b"}, "which is no name"),
    ("SaveStudent", {"name": "taken student"}, "taken student is already there. Nothing is overwritten unless you say so"),
    ("SaveStudent", {"name": "foreign", "overwrite": True}, "holds notes.txt, which would be lost"),
    ("SaveStudent", {"name": "foreign", "format": "single file", "overwrite": True}, "WanLite did not write it"),
    ("SaveStudent", {"name": "graph taken", "format": "single file"}, "graph taken.workflow.json is already there"),
    ("Compare", {"clips": 0}, "clips is 0. Set it between 1 and 64"),
    ("Compare", {"sampler": "gone"}, "sampler is 'gone', which is not offered"),
    ("Compare", {"boundary": 0.9}, "boundary is 0.9, and no other expert is connected"),
    ("Compare", {"expert": "high noise"}, "Connect the MODEL of the expert of low noise"),
    ("RemapLoRA", {"lora": "gone.safetensors"}, "gone.safetensors is not in ComfyUI's LoRA folders any more"),
    ("RemapLoRA", {"lora": "style.safetensors", "more": "style*\nnothing*"}, "No LoRA that ComfyUI lists is called or matches 'nothing*'"),
    ("RemapLoRA", {"lora": "style.safetensors", "suffix": "/../b"}, "cannot be a LoRA's name"),
    ("RemapLoRA", {"lora": "style.safetensors", "suffix": "-b"}, "style-b.safetensors is already there"),
    ("RemapLoRA", {"lora": "style.safetensors", "suffix": "-b", "overwrite": True}, "WanLite did not write it"),
]


@pytest.mark.parametrize("name, given, words", REFUSED, ids=[f"{name} {' '.join(given)}" for name, given, _ in REFUSED])
def test_what_widgets_alone_decide_is_refused_before_the_queue_on_its_node(name, given, words, validated):
    answer = validated(name, **given)
    assert not answer.valid and answer.wrong == ["ours"]
    assert len(answer.told) == 1 and words in answer.told[0], answer.told


@pytest.mark.parametrize("name, given", [
    ("EncodePrompts", {"bank": BANK}), ("EncodePrompts", {"bank": "bank taken.safetensors", "save_as": "bank taken"}),
    ("EncodePrompts", {"clip": CLIP, "prompts": "a cat"}), ("EncodePrompts", {"prompts": TEXT}),
    ("EncodePrompts", {"clip": CLIP, "prompts": TEXT, "preview": 9}), ("EncodePrompts", {"clip": CLIP, "prompt_file": "WanLite/video.txt", "preview": 96}),
    ("EncodePrompts", {"conditioning": CONDITIONING, "negative_conditioning": CONDITIONING, "preview": 2}),
    ("EncodePrompts", {"clip": CLIP, "folder": "with captions", "show": "nothing"}),
    ("EncodePrompts", {"clip": CLIP, "folder": "with captions", "vae": VAE, "latent": LATENT}),
    ("CreateStudent", {}), ("CreateStudent", {"preset": "custom", "keep_map": "0-3,5", "depth": 5}),
    ("CreateStudent", {"expert": "low noise", "other_expert": MODEL}),
    ("Recipe", {}), ("Recipe", {"objective": "velocity", "rank": 0, "own_states": 0.2, "renoised": 0.0, "optimizer": "Muon"}),
    ("Recipe", {"rank": 16, "frozen_float8": "on", "swapped_blocks": 4}),
    ("Distill", {}), ("Distill", {"recipe": RECIPE, "minutes": 0.0, "steps": 500}), ("Distill", {"run_name": TEXT}), ("Distill", {"other_expert": MODEL}),
    ("SaveStudent", {}), ("SaveStudent", {"name": TEXT}), ("SaveStudent", {"name": "taken student", "overwrite": True}),
    ("SaveStudent", {"name": "taken student", "format": "GGUF", "dtype": "Q8_0"}),
    ("Compare", {}), ("Compare", {"expert": "high noise", "other_expert": MODEL, "boundary": 0.9}), ("RemapLoRA", {"lora": "style.safetensors"}),
    ("RemapLoRA", {"lora": "style.safetensors", "more": "*", "suffix": "-c"}), ("RemapLoRA", {"lora": "style.safetensors", "suffix": TEXT})])
def test_what_may_work_is_let_through(name, given, validated):
    answer = validated(name, **given)
    assert answer.valid and not answer.told, answer.told


def test_a_name_that_this_process_saved_to_may_be_queued_again_and_what_it_overwrites_is_never_foreign(validated, pack, comfyui):
    """Queued again, the save comes from ComfyUI's cache."""
    from helpers_bridge import call
    handle = pack("wanlite_model.compress.handle").StudentHandle.of(comfyui.base / "models/diffusion_models/taken student")
    save = pack("nodes.student").WanLiteSaveStudent
    call(save, student=handle, name="queued twice", format="single file")
    again = {"name": "queued twice", "format": "single file"}
    assert validated("SaveStudent", **again).valid and validated("SaveStudent", **{**again, "dtype": "fp16"}).valid
    pack("nodes.comfy_bridge.save")._saved.clear()                  # another process
    assert "queued twice.safetensors is already there" in validated("SaveStudent", **again).told[0]
    call(save, student=handle, name=again["name"], format="single file")            # through a link: only then does it show that it is the same
    assert validated("SaveStudent", **again).valid
