"""Writes example_workflows/, the templates and their thumbnails: `python -m demo.workflows`.

Node sizes, sockets and the order of widgets are read from a real ComfyUI with the pack in it, so the files always fit its nodes. What a graph sets is
written here by the names of the inputs, and what it does not set keeps the node's default.
"""
import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from . import domain, thumbnails
from .canvas import BELOW, CREATE, DISTIL, GROUPS, LOOK, NOTE, PROMPTS, SAVE, TEACHER, Canvas
from .comfy_path import ROOT
from .comfy_server import running_comfyui
from .downloads import DOWNLOADS, I2V_HIGH, I2V_LOW, SPEED_LORA, T2V_1_3B, T2V_14B, TEXT_ENCODER, VAE, note

FOLDER = ROOT / "example_workflows"
TINY, REAL = FOLDER / "wanlite_tiny_demo.json", FOLDER / "wanlite_wan2.1_1.3b_slim.json"
PAIR, FEW_STEP, IMAGE = (FOLDER / f"wanlite_{name}.json" for name in ("wan2.2_a14b_i2v_slim", "wan2.1_14b_4_steps", "wan2.1_1.3b_image"))
BANK, STUDENT = "wan_tiny_prompts.safetensors", "wan_tiny_student"
PICTURES = "my_pictures"                # a folder of ComfyUI's input folder

Wiring = dict[str, tuple]               # {key: (node class, place, {input: value or Link}), and a title where it is not the node's own}
Setting = dict[str, Any]

REAL_PROMPTS = """\
# One prompt a line. Use prompts like those you generate with: the student learns what they show best.
A red fox walks through fresh snow in a pine forest, morning light, the camera follows it.
A woman in a yellow raincoat crosses a busy street at night, neon signs mirrored in the puddles.
Waves break on black rocks at sunset, slow motion, spray in the air.
A steam train crosses a stone viaduct in the mountains, seen from above.
A potter shapes a clay bowl on a turning wheel, close-up of wet hands.
An astronaut floats past a window of the space station, the Earth below.
A golden retriever shakes off water on a beach, droplets flying.
A time lapse of clouds rolling over a city skyline at dusk.
A chef tosses vegetables in a pan, flames rise, dark kitchen.
A ballerina spins on an empty stage, one spotlight, dust in the air.
A hummingbird hovers at a pink flower, shallow depth of field.
An old man plays chess in a park, autumn leaves fall around him.
A sports car drives along a coastal road, tracking shot from the side.
Ink drops spread in clear water, macro, white background.
A child blows soap bubbles in a garden, backlit, warm colours.
A lighthouse in a storm at night, its beam sweeps over the sea.
A cat jumps from a sofa onto a window sill and looks outside.
A market in Marrakesh, people walk past stalls of spices, handheld camera.
A drone flies over a river that winds through a green canyon.
A robot waters plants on a balcony, soft morning light, animation style.
Two people skate on a frozen lake, long shot, cold blue light.
A candle flickers beside an open book, rain runs down the window behind it.
A herd of horses gallops through a shallow river, water splashing.
A watercolour painting of a village comes to life, smoke rises from the chimneys."""

REAL_TEXT = {
    "clip": ("CLIPLoader", PROMPTS, {"clip_name": TEXT_ENCODER, "type": "wan"}),
    "prompts": ("WanLiteEncodePrompts", PROMPTS, {"clip": ("clip", 0), "prompts": REAL_PROMPTS}),
}


def one_student(setting: Setting) -> Wiring:
    """The whole job for one WAN."""
    asked = {"prompts": ("prompts", 0), "latent": ("latent", 0)}
    recipe = {"recipe": ("recipe", 0)} if "recipe" in setting else {}
    return {
        "note": ("MarkdownNote", NOTE, {"": setting["note"]}, "Read this first"),
        "unet": ("UNETLoader", TEACHER, {"unet_name": setting["teacher"]}),
        "teacher": ("ModelSamplingSD3", TEACHER, {"model": ("unet", 0), "shift": setting["shift"]}),
        "vae": ("VAELoader", TEACHER, {"vae_name": setting["vae"]}),
        "latent": ("EmptyHunyuanLatentVideo", TEACHER, _latent(setting["size"]), "Size and length"),
        **setting["text"],
        "create": ("WanLiteCreateStudent", CREATE, {"model": ("teacher", 0), **asked, "cfg": setting["cfg"], **setting["create"]}),
        "create_report": ("PreviewAny", CREATE, {"source": ("create", 1)}, "What was kept"),
        **({"recipe": ("WanLiteRecipe", DISTIL, setting["recipe"])} if recipe else {}),
        "distill": ("WanLiteDistill", DISTIL, {"student": ("create", 0), "model": ("teacher", 0), "vae": ("vae", 0), **asked, **recipe,
                                               "preset": setting["preset"], "cfg": setting["cfg"], "run_name": setting["name"], **setting["job"]}),
        "distill_report": ("PreviewAny", DISTIL, {"source": ("distill", 3)}, "What was reached"),
        "save": ("WanLiteSaveStudent", SAVE, {"student": ("distill", 0), "name": setting["name"], **setting["save"]}),
        "save_report": ("PreviewAny", SAVE, {"source": ("save", 1)}, "What was saved"),
        "chart": ("SaveImage", SAVE, {"images": ("distill", 4), "filename_prefix": "wanlite/chart"}, "Chart of the training"),
        **_looked_at(setting, asked),
    }


def two_experts(setting: Setting) -> Wiring:
    """The same for both experts of 2.2, each the other one's other_expert; both students are sampled together."""
    asked = {"prompts": ("prompts", 0), "latent": ("latent", 0)}
    sides = ("high", "low")
    graph = {"note": ("MarkdownNote", NOTE, {"": setting["note"]}, "Read this first")}
    for side in sides:
        graph |= {
            f"unet {side}": ("UNETLoader", TEACHER, {"unet_name": setting["teacher"][side]}, f"WAN for {side} noise"),
            f"teacher {side}": ("ModelSamplingSD3", TEACHER, {"model": (f"unet {side}", 0), "shift": setting["shift"]})}
    graph |= {"vae": ("VAELoader", TEACHER, {"vae_name": setting["vae"]}),
              "latent": ("EmptyHunyuanLatentVideo", TEACHER, _latent(setting["size"]), "Size and length"), **setting["text"]}
    for side, other, row in zip(sides, sides[::-1], (0, BELOW)):
        name = setting["name"].format(side=side)
        of = {"model": (f"teacher {side}", 0), "other_expert": (f"teacher {other}", 0), "cfg": setting["cfg"], **asked}
        graph |= {
            f"create {side}": ("WanLiteCreateStudent", CREATE + row, {**of, "expert": f"{side} noise", **setting["create"]}),
            f"create_report {side}": ("PreviewAny", CREATE + row, {"source": (f"create {side}", 1)}, "What was kept"),
            f"distill {side}": ("WanLiteDistill", DISTIL + row, {**of, "student": (f"create {side}", 0), "preset": setting["preset"],
                                                                 "run_name": name, **setting["job"]}),
            f"distill_report {side}": ("PreviewAny", DISTIL + row, {"source": (f"distill {side}", 3)}, "What was reached"),
            f"save {side}": ("WanLiteSaveStudent", SAVE + row, {"student": (f"distill {side}", 0), "name": name, **setting["save"]}),
            f"save_report {side}": ("PreviewAny", SAVE + row, {"source": (f"save {side}", 1)}, "What was saved")}
    sampled, asked = _sampling(setting["steps"]), {"positive": ("prompts", 1), "negative": ("prompts", 2)}
    sampled["noise_seed"] = sampled.pop("seed")
    first = {"start_at_step": 0, "end_at_step": setting["handed_over"], "add_noise": "enable", "return_with_leftover_noise": "enable"}
    rest = {"start_at_step": setting["handed_over"], "end_at_step": 10000, "add_noise": "disable", "return_with_leftover_noise": "disable"}
    return graph | {
        "sample high": ("KSamplerAdvanced", LOOK, {"model": ("distill high", 1), **asked, "latent_image": ("latent", 0), **sampled, **first},
                        "KSampler for high noise"),
        "sample low": ("KSamplerAdvanced", LOOK, {"model": ("distill low", 1), **asked, "latent_image": ("sample high", 0), **sampled, **rest},
                       "KSampler for low noise"),
        "decode": ("VAEDecode", LOOK, {"samples": ("sample low", 0), "vae": ("vae", 0)}),
        "video": _shown("decode", "wanlite/student", setting["fps"], still=False)}


def _looked_at(setting: Setting, asked: dict[str, Any]) -> Wiring:
    """The student's own sample, and it beside its teacher, and beside the LoRA that it started from, where there is one."""
    graph, third, still = {}, {}, setting["size"][2] == 1
    if speed_lora := setting.get("speed_lora"):
        graph["speed_lora"] = ("LoraLoaderModelOnly", LOOK, {"model": ("teacher", 0), "lora_name": speed_lora}, "The speed LoRA as it came")
        third = {"third": ("speed_lora", 0)}
    return graph | {
        "sample_student": ("KSampler", LOOK, {"model": ("distill", 1), **_sampling(setting["steps"]), "positive": ("prompts", 1), "negative": ("prompts", 2),
                                              "latent_image": ("latent", 0)}),
        "decode_student": ("VAEDecode", LOOK, {"samples": ("sample_student", 0), "vae": ("vae", 0)}),
        "clip_student": _shown("decode_student", "wanlite/student", setting["fps"], still),
        "compare": ("WanLiteCompare", LOOK, {"teacher": ("teacher", 0), "student": ("distill", 1), **third, **asked, "vae": ("vae", 0),
                                             **setting["compare"]}),
        "metrics": ("PreviewAny", LOOK, {"source": ("compare", 1)}, "Size, speed and closeness"),
        "sheet": _shown("compare", "wanlite/compare", setting["fps"], still),
    }


def _latent(size: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("width", "height", "length", "batch_size"), (*size, 1)))


def _sampling(steps: int) -> dict[str, Any]:
    return {"steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "seed": 0}


def _shown(images: str, prefix: str, fps: float, still: bool) -> tuple:
    given = {"images": (images, 0), "filename_prefix": prefix}
    return ("SaveImage", LOOK, given) if still else ("SaveAnimatedWEBP", LOOK, {**given, "fps": fps})


SLIMMER = {"preset": "2/3 of the blocks", "block_steps": 150}
SETTINGS: dict[Path, Setting] = {
    TINY: {
        "note": note(TINY.stem), "teacher": "wan_tiny_teacher.safetensors", "vae": "wan_tiny_vae.safetensors", "name": STUDENT,
        "shift": domain.SHIFT, "cfg": domain.CFG, "steps": 6, "size": (domain.SIZE, domain.SIZE, domain.FRAMES), "fps": 8.0,
        "text": {"prompts": ("WanLiteEncodePrompts", PROMPTS, {"bank": f"input/{BANK}"})}, "create": {"preset": "2/3 of the blocks"}, "preset": "slim",
        "recipe": {"learning_rate": 5e-3, "batch_size": 16, "teacher_steps": 6, "renoised": 0.7, "evaluations": 4},
        "job": {"steps": 520}, "save": {"overwrite": True}, "compare": {"teacher_cfg": domain.CFG, "student_steps": 6, "clips": 4},
    },
    REAL: {
        "note": note(REAL.stem, T2V_1_3B, TEXT_ENCODER, VAE), "teacher": T2V_1_3B, "vae": VAE, "name": "wan2.1_1.3B_slim",
        "shift": 8.0, "cfg": 6.0, "steps": 20, "size": (832, 480, 17), "fps": 16.0,
        "text": REAL_TEXT, "create": SLIMMER, "preset": "slim", "job": {"minutes": 90.0}, "save": {}, "compare": {"teacher_cfg": 6.0, "clips": 1},
    },
    PAIR: {
        "wiring": two_experts, "note": note(PAIR.stem, I2V_HIGH, I2V_LOW, TEXT_ENCODER, VAE), "teacher": {"high": I2V_HIGH, "low": I2V_LOW}, "vae": VAE,
        "name": "wan2.2_i2v_{side}_noise_slim",
        "groups": {**GROUPS, **{place: (f"{GROUPS[place][0]}, high noise", GROUPS[place][1]) for place in (CREATE, DISTIL, SAVE)},
                   **{place + BELOW: (f"{GROUPS[place][0]}, low noise", GROUPS[place][1]) for place in (CREATE, DISTIL, SAVE)}},
        "shift": 8.0, "cfg": 3.5, "steps": 20, "handed_over": 10, "size": (832, 480, 17), "fps": 16.0,
        "text": {"clip": REAL_TEXT["clip"],
                 "prompts": ("WanLiteEncodePrompts", PROMPTS, {"clip": ("clip", 0), "vae": ("vae", 0), "latent": ("latent", 0), "folder": PICTURES})},
        "create": {"preset": "3/4 of the blocks", "method": "interleaved", "block_steps": 150}, "preset": "no-cfg", "job": {"minutes": 480.0},
        "save": {"format": "single file", "dtype": "fp8"},
    },
    FEW_STEP: {
        "note": note(FEW_STEP.stem, T2V_14B, SPEED_LORA, TEXT_ENCODER, VAE), "teacher": T2V_14B, "vae": VAE, "speed_lora": SPEED_LORA, "name": "my_wan_4_steps",
        "shift": 5.0, "cfg": 5.0, "steps": 4, "size": (832, 480, 17), "fps": 16.0,
        "text": REAL_TEXT, "create": {"preset": "same size"}, "preset": "few-step 4", "recipe": {"start_from": SPEED_LORA},
        "job": {"minutes": 180.0}, "save": {"format": "LoRA"}, "compare": {"student_steps": 4, "third_steps": 4, "clips": 1},
    },
    IMAGE: {
        "note": note(IMAGE.stem, T2V_1_3B, TEXT_ENCODER, VAE), "teacher": T2V_1_3B, "vae": VAE, "name": "wan2.1_1.3B_image",
        "shift": 5.0, "cfg": 5.0, "steps": 8, "size": (640, 640, 1), "fps": 16.0,
        "create": SLIMMER, "preset": "image", "job": {"minutes": 45.0}, "save": {}, "compare": {"student_steps": 8, "clips": 4},
        "text": {"clip": REAL_TEXT["clip"],
                 "prompts": ("WanLiteEncodePrompts", PROMPTS, {"clip": ("clip", 0), "prompt_file": "WanLite/image.txt",
                                                               "prompts": "# Yours, one prompt a line. The list that prompt_file names is added to them.\n"})},
    },
}


def build(setting: Setting, object_info: dict) -> dict[str, Any]:
    """The workflow as the browser saves it.

    Raises KeyError where the wiring names a node or an input that this ComfyUI does not have.
    """
    canvas = Canvas(info=object_info, groups=setting.get("groups", GROUPS), downloads=DOWNLOADS)
    for key, node in setting.get("wiring", one_student)(setting).items():
        canvas.add(key, *node)
    return canvas.saved()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui", help="the ComfyUI whose nodes the files are to fit")
    comfyui = parser.parse_args().comfyui
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base, running_comfyui(comfyui, Path(base), ("--cpu",)) as server:
        object_info = server.object_info()
    for path, setting in SETTINGS.items():
        path.write_text(json.dumps(build(setting, object_info), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        thumbnails.write(path.with_suffix(".jpg"))


if __name__ == "__main__":
    main()
