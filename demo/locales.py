"""Writes locales/en: `python -m demo.locales`, from what the nodes say of themselves. With --translated zh: notes that locales/zh says the same as it does now.

ComfyUI serves nodeDefs.json and main.json of each language, and no other file there but commands.json and settings.json.
"""
import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wanlite_model.files import read_json

from .comfy_path import ROOT
from .comfy_server import running_comfyui

FOLDER = ROOT / "locales"
NODES, REST, SOURCE = "nodeDefs.json", "main.json", "translated_from.json"        # the last one: {key: hash of the English that it was translated from}
ENGLISH = {"nodeCategories": {"WanLite": "WanLite"}}


def definitions(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of WanLite's nodes as the browser looks them up. object_info: as ComfyUI's /object_info has it."""
    return {name: _node(info) for name, info in object_info.items() if name.startswith("WanLite")}


def texts(translated: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """("WanLiteDistill.inputs.cfg.tooltip", its text) of all texts."""
    for key, value in translated.items():
        if isinstance(value, str):
            yield above + key, value
        else:
            yield from texts(value, f"{above}{key}.")


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _node(info: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {name: declared for group in ("required", "optional") for name, declared in info["input"].get(group, {}).items()}
    outputs = enumerate(zip(info["output_name"], info["output_tooltips"]))
    return {"display_name": info["display_name"], "description": info["description"],
            "inputs": {name: {"name": name, "tooltip": declared[1]["tooltip"]} for name, declared in inputs.items()},
            "outputs": {str(slot): {"name": name, "tooltip": tooltip} for slot, (name, tooltip) in outputs}}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui", help="the ComfyUI that tells of the nodes")
    parser.add_argument("--translated", metavar="LANGUAGE", help="note that this language says what English says now")
    given = parser.parse_args()
    if given.translated:
        english = [*texts(read_json(FOLDER / "en" / NODES)), *texts(ENGLISH)]
        _write(FOLDER / given.translated / SOURCE, {key: hashed(text) for key, text in english})
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base, running_comfyui(given.comfyui, Path(base), ("--cpu",)) as server:
        _write(FOLDER / "en" / NODES, definitions(server.object_info()))
    _write(FOLDER / "en" / REST, ENGLISH)


if __name__ == "__main__":
    main()
