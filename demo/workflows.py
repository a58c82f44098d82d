"""Writes example_workflows/: `python -m demo.workflows`. One graph, wired once, for the demo's tiny WAN and for the real 1.3B.

Node sizes, sockets and the order of widgets are read from a real ComfyUI with the pack in it, so the files always fit its nodes.
"""
import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from . import domain
from .comfy_path import ROOT
from .comfy_server import running_comfyui
from .graph import controls, widgets

FOLDER = ROOT / "example_workflows"
TINY, REAL = FOLDER / "wanlite_tiny_demo.json", FOLDER / "wanlite_wan2.1_1.3b_slim.json"
BANK, STUDENT = "wan_tiny_prompts.safetensors", "wan_tiny_student"
COLUMN, GAP, TITLE, ROW, MARGIN = 460, 40, 34, 26, 24        # pixels of the canvas

Link = tuple[str, int]      # (key of a node, which of its outputs)

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


def wiring(setting: dict[str, Any]) -> dict[str, tuple[str, int, dict[str, Any]]]:
    """{key: (node class, column, {input: value or Link})}; what is not named keeps the node's default."""
    sampler = {"steps": setting["steps"], "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "seed": 0,
                       "positive": ("prompts", 1), "negative": ("prompts", 2), "latent_image": ("latent", 0)}
    return {
        "note": ("MarkdownNote", 0, {"": setting["note"]}),
        "unet": ("UNETLoader", 0, {"unet_name": setting["teacher"]}),
        "teacher": ("ModelSamplingSD3", 0, {"model": ("unet", 0), "shift": setting["shift"]}),
        "vae": ("VAELoader", 0, {"vae_name": setting["vae"]}),
        "latent": ("EmptyHunyuanLatentVideo", 0, dict(zip(("width", "height", "length", "batch_size"), (*setting["size"], 1)))),
        **setting["text"],
        "create": ("WanLiteCreateStudent", 1, {"model": ("teacher", 0), "prompts": ("prompts", 0), "latent": ("latent", 0), "cfg": setting["cfg"],
                                               "preset": "2/3 of the blocks"}),
        "create_report": ("PreviewAny", 1, {"source": ("create", 1)}),
        "recipe": ("WanLiteRecipe", 1, setting["recipe"]),
        "distill": ("WanLiteDistill", 2, {"student": ("create", 0), "model": ("teacher", 0), "prompts": ("prompts", 0), "latent": ("latent", 0),
                                          "recipe": ("recipe", 0), "cfg": setting["cfg"], "run_name": setting["name"], **setting["job"]}),
        "distill_report": ("PreviewAny", 2, {"source": ("distill", 3)}),
        "save": ("WanLiteSaveStudent", 2, {"student": ("distill", 0), "name": setting["name"], "overwrite": setting["overwrite"]}),
        "save_report": ("PreviewAny", 2, {"source": ("save", 1)}),
        "loss": ("LossGraphNode", 2, {"loss": ("distill", 2), "filename_prefix": "wanlite/loss"}),
        "chart": ("SaveImage", 3, {"images": ("distill", 4), "filename_prefix": "wanlite/chart"}),
        "sample_student": ("KSampler", 3, {**sampler, "model": ("distill", 1)}),
        "decode_student": ("VAEDecode", 3, {"samples": ("sample_student", 0), "vae": ("vae", 0)}),
        "clip_student": ("SaveAnimatedWEBP", 3, {"images": ("decode_student", 0), "filename_prefix": "wanlite/student", "fps": setting["fps"]}),
        "compare": ("WanLiteCompare", 4, {"teacher": ("teacher", 0), "student": ("distill", 1), "prompts": ("prompts", 0),
                                          "vae": ("vae", 0), "latent": ("latent", 0), **setting["compare"]}),
        "metrics": ("PreviewAny", 4, {"source": ("compare", 1)}),
        "sheet": ("SaveAnimatedWEBP", 4, {"images": ("compare", 0), "filename_prefix": "wanlite/compare", "fps": setting["fps"]}),
    }


_TINY_NOTE = """\
## WanLite, the whole job on a tiny WAN
The teacher is a genuine WAN of 12 blocks that draws one coloured ball moving over a background. The student keeps 8 of them, needs no
guidance, and is saved as a WAN that *Load Diffusion Model* opens.

`python run.py demo` puts the three files this graph asks for in place and queues it: **wan_tiny_teacher**, **wan_tiny_vae**, and the prompt bank
that stands for the text encoder."""

_REAL_NOTE = """\
## A slimmer WAN 2.1 1.3B without CFG
Replace the model by your own fine-tune, or put LoRA loaders behind it: they become part of the student. Replace the prompts by yours, one a line.

**minutes** on *WanLite Distill* is the length of the whole job. Cancel keeps everything; queue again and it goes on. The result lies under
models/diffusion_models and opens with *Load Diffusion Model*; the workflow saved beside it has the right steps, cfg and shift."""

_REAL_TEXT = {
    "clip": ("CLIPLoader", 0, {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"}),
    "prompts": ("WanLiteEncodePrompts", 1, {"clip": ("clip", 0), "prompts": REAL_PROMPTS}),
}

SETTINGS: dict[Path, dict[str, Any]] = {
    TINY: {
        "note": _TINY_NOTE, "teacher": "wan_tiny_teacher.safetensors", "vae": "wan_tiny_vae.safetensors", "name": STUDENT,
        "shift": domain.SHIFT, "cfg": domain.CFG, "steps": 6, "size": (domain.SIZE, domain.SIZE, domain.FRAMES), "fps": 8.0,
        "text": {"prompts": ("WanLiteEncodePrompts", 1, {"bank": f"input/{BANK}"})},
        "recipe": {"learning_rate": 5e-3, "batch_size": 16, "teacher_steps": 6, "renoised": 0.7, "evaluations": 4},
        "job": {"steps": 520}, "overwrite": True, "compare": {"teacher_cfg": domain.CFG, "student_steps": 6, "clips": 4},
    },
    REAL: {
        "note": _REAL_NOTE, "teacher": "wan2.1_t2v_1.3B_fp16.safetensors", "vae": "wan_2.1_vae.safetensors", "name": "wan2.1_1.3B_slim",
        "shift": 5.0, "cfg": 5.0, "steps": 20, "size": (832, 480, 17), "fps": 16.0, "text": _REAL_TEXT,
        "recipe": {"learning_rate": 5e-5, "batch_size": 1}, "job": {"minutes": 90.0}, "overwrite": False, "compare": {"clips": 1},
    },
}


def build(setting: dict[str, Any], object_info: dict) -> dict[str, Any]:
    """The workflow as the browser saves it (version 0.4).

    Raises KeyError where the wiring names a node or an input that this ComfyUI does not have.
    """
    graph = _Graph(object_info)
    for key, (kind, column, values) in wiring(setting).items():
        graph.add(key, kind, column, values)
    return graph.saved()


class _Graph:
    def __init__(self, object_info: dict) -> None:
        self._info, self._nodes, self._links, self._bottoms = object_info, {}, [], {}

    def add(self, key: str, kind: str, column: int, values: dict[str, Any]) -> None:
        """Adds a node below the last of its column."""
        spec = self._info[kind] if kind in self._info else {"input": {"required": {"": ["STRING", {}]}}, "output": []}
        shown = widgets(spec["input"])
        declared = {name: value for group in ("required", "optional") for name, value in spec["input"].get(group, {}).items()}
        if unknown := set(values) - set(declared):
            raise KeyError(f"{kind} has no input named {sorted(unknown)[0]!r}")
        number = len(self._nodes) + 1
        sockets = [name for name in declared if name not in dict(shown)]
        node = {"id": number, "type": kind, "flags": {}, "order": number - 1, "mode": 0,
                "inputs": [{"name": name, "type": declared[name][0], "link": None} for name in sockets],
                "outputs": [{"name": name, "type": type_, "slot_index": i, "links": []}
                            for i, (name, type_) in enumerate(zip(spec.get("output_name", ()), spec["output"]))],
                "properties": {"Node name for S&R": kind}, "widgets_values": []}
        for slot, name in enumerate(sockets):
            if name in values:
                self._connect(node, slot, values[name])
        for name, value in shown:
            node["widgets_values"] += [values.get(name, _default(value)), *("fixed" for _ in controls(name, value))]
        self._place(node, column, shown, values)
        self._nodes[key] = node

    def _connect(self, node: dict, slot: int, link: Link) -> None:
        origin = self._nodes[link[0]]
        self._links.append([len(self._links) + 1, origin["id"], link[1], node["id"], slot, origin["outputs"][link[1]]["type"]])
        node["inputs"][slot]["link"] = len(self._links)
        origin["outputs"][link[1]]["links"].append(len(self._links))

    def _place(self, node: dict, column: int, shown: list, values: dict[str, Any]) -> None:
        many_lines = sum(130 for name, value in shown if len(value) > 1 and value[1].get("multiline"))
        shows = {"MarkdownNote": 180, "PreviewAny": 160}
        pictures = 300 if node["type"].startswith(("Save", "LossGraph")) else shows.get(node["type"], 0)
        rows = max(len(node["inputs"]), len(node["outputs"])) + len(node["widgets_values"])
        height = ROW * rows + MARGIN + many_lines + pictures
        top = self._bottoms.get(column, 0)
        node["pos"], node["size"] = [column * (COLUMN + GAP), top], [COLUMN, height]
        self._bottoms[column] = top + height + GAP + TITLE

    def saved(self) -> dict[str, Any]:
        return {"last_node_id": len(self._nodes), "last_link_id": len(self._links), "nodes": list(self._nodes.values()),
                "links": self._links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def _default(declared: list) -> Any:
    options = declared[1] if len(declared) > 1 else {}
    choices = declared[0] if isinstance(declared[0], list) else options.get("options")
    return options.get("default", choices[0] if choices else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui", help="the ComfyUI whose nodes the files are to fit")
    comfyui = parser.parse_args().comfyui
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base, running_comfyui(comfyui, Path(base), ("--cpu",)) as server:
        object_info = server.object_info()
    for path, setting in SETTINGS.items():
        path.write_text(json.dumps(build(setting, object_info), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
