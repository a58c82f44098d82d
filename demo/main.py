"""The whole job, end to end: `python run.py demo`, which calls `python -m demo.main --comfyui FOLDER`.

A real ComfyUI server takes the shipped graph: it loads the tiny WAN teacher, distils a student, saves it. A second graph, of the
student's own saved workflow, opens the file with the stock Load Diffusion Model and samples it. Then teacher, plain cut and student are
measured on the same 128 prompts and noises, and everything lands in output/demo: demo.png, summary.json, the clips.
All of it on the CPU, whatever the machine has. The exit code is 1 when a promise about the numbers was not kept.
"""
import argparse
import hashlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from wanlite_model.files import read_json, write_json

from .comfy_path import ROOT, put_comfyui_first
from .comfy_server import ComfyServer, running_comfyui
from .graph import to_api
from .measure import TEACHER, VAE
from .tiny import bank, place
from .workflows import BANK, STUDENT, TINY

OUTPUT = ROOT / "output" / "demo"
BASE = OUTPUT / "comfyui"                   # the server's own models/, input/, output/
CUT, STAMP = "wan_tiny_plain_cut", "made_from.txt"
MINUTES = 10                                # reported and not held against: how fast a machine is shows nothing of the student


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of the ComfyUI to use")
    comfyui = parser.parse_args().comfyui
    put_comfyui_first(comfyui)
    began = time.monotonic()
    say("Preparing a private ComfyUI folder: tiny WAN teacher, tiny WAN VAE, prompt bank.")
    forget_another_demo(BASE)
    prepare(BASE)
    with running_comfyui(comfyui, BASE, ("--cpu",)) as server:
        say(f"ComfyUI is up. Queueing {TINY.name}: teacher -> student -> saved as a WAN.")
        queue_shown(server, shipped_graph(server))
        say("Opening the saved student with the stock Load Diffusion Model and sampling it with the stock KSampler.")
        queue_shown(server, stock_graph(server))
    say("Measuring teacher, plain cut and student on 128 fixed prompts and noises.")
    from .compare import measure, promises
    from .sheet import draw
    result = measure(BASE, STUDENT, CUT)
    keep_clips(BASE / "output" / "wanlite", OUTPUT)
    write_json(OUTPUT / "summary.json", result.summary)
    draw(result, OUTPUT / "demo.png")
    held = promises(result.rows)
    print(f"\n{distill_report(BASE)}\n\n{result.table()}\n", *held, sep="\n")
    print(f"\nPicture: {OUTPUT / 'demo.png'}\nNumbers: {OUTPUT / 'summary.json'}\nStudent: {BASE / 'models' / 'diffusion_models' / STUDENT}")
    say(f"Done in {(time.monotonic() - began) / 60:.1f} minutes; {MINUTES} are meant to be enough on two CPU cores.")
    return 0 if all(promise.kept for promise in held) else 1


def forget_another_demo(base: Path) -> None:
    """Removes what a demo with another graph, teacher or engine left: its run could not be gone on with."""
    if base.exists() and not ((base / STAMP).is_file() and (base / STAMP).read_text(encoding="utf-8") == made_from()):
        shutil.rmtree(base)


def made_from() -> str:
    """A hash of all that decides the student: the graph, the models, the prompts, and the code of engine and nodes."""
    code = sorted(path for folder in ("wanlite_model", "nodes") for path in (ROOT / folder).rglob("*.py"))
    digest = hashlib.sha256(bank().fingerprint.encode())
    for path in (TINY, TEACHER, VAE, *code):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def prepare(base: Path) -> None:
    """Puts the demo's files where the shipped graph looks for them. What an earlier demo made stays: queueing again is quick."""
    place(base)
    (base / STAMP).write_text(made_from(), encoding="utf-8")


def shipped_graph(server: ComfyServer) -> dict:
    """example_workflows' tiny graph, as the browser would send it."""
    return to_api(read_json(TINY), server.object_info())


def stock_graph(server: ComfyServer) -> dict:
    """The workflow that was saved beside the student, its text encoder replaced by the prompt bank and its VAE by the tiny one."""
    saved = server.base / "models" / "diffusion_models" / STUDENT / f"{STUDENT}.workflow.json"
    prompt = to_api(read_json(saved), server.object_info())
    replaced = {key for key, node in prompt.items() if node["class_type"] in ("CLIPLoader", "CLIPTextEncode")}
    bank = {"class_type": "WanLiteEncodePrompts", "_meta": {"title": "Prompt bank"},
            "inputs": {"prompts": "", "prompt_file": "none", "template": "{prompt}", "negative": "", "bank": f"input/{BANK}", "save_as": "",
                       "preview": 1, "folder": "none", "show": "first frame"}}
    prompt = {key: node for key, node in prompt.items() if key not in replaced} | {"bank": bank}
    for node in prompt.values():
        for output, name in ((1, "positive"), (2, "negative")):
            if name in node["inputs"] and node["class_type"] == "KSampler":
                node["inputs"][name] = ["bank", output]
        if node["class_type"] == "VAELoader":
            node["inputs"]["vae_name"] = "wan_tiny_vae.safetensors"
        if node["class_type"] == "KSampler":
            node["inputs"]["seed"] = 0
        if "filename_prefix" in node["inputs"]:
            node["inputs"]["filename_prefix"] = "wanlite/stock"
    return prompt


def queue_shown(server: ComfyServer, prompt: dict[str, Any]) -> dict:
    """Queues a graph and shows what it does; returns its outputs. Raises ServerError when it fails."""
    prompt_id = server.queue(prompt)
    for event in server.events(prompt_id, timeout=900):
        data = event["data"]
        if event["type"] == "executing" and data.get("node"):
            say(f"  {prompt[data['node']]['class_type']}")
        elif event["type"] == "progress" and sys.stderr.isatty():
            print(f"\r  {data['value']:5} / {data['max']}  ", end="", file=sys.stderr, flush=True)
    return server.outputs(prompt_id)


def distill_report(base: Path) -> str:
    """What WanLite Distill said at its end: the held-out error beside the plain cut's, and how the student is sampled."""
    return read_json(base / "output" / "wanlite" / "runs" / STUDENT / "job.json")["finished"]["report"]


def keep_clips(made: Path, target: Path) -> None:
    """Copies the newest of each clip and picture that the graphs wrote to where people look."""
    for name in ("student", "compare", "stock", "chart"):
        found = sorted(made.glob(f"{name}_*"), key=lambda path: path.stat().st_mtime)
        if found:
            shutil.copyfile(found[-1], target / f"{name}{found[-1].suffix}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
