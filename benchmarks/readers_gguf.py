"""GGUF through the real ComfyUI-GGUF: a student's start beside what the file says, and beside what its MODEL answers.

    python -m benchmarks.readers_gguf ComfyUI/custom_nodes/ComfyUI-GGUF

It needs that custom node's folder (github.com/city96/ComfyUI-GGUF), which is on no package index, and its package `gguf`. One table on standard
output: shares of the largest value, so that 1e-3 means a thousandth. A few seconds on a CPU; every WAN in it is tiny and random.
"""
from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.comfy_path import ROOT, open_comfyui, pack_module
from wanlite_model.formats.read import open_wan

KINDS = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q4_K")
LORA = 0.5                              # strength


def open_with_comfyui_gguf(file: Path, custom_node: Path) -> Any:
    """The MODEL that ComfyUI-GGUF's Unet Loader makes of a file, as in a node. custom_node: its folder. ComfyUI must be importable."""
    import folder_paths
    name = "comfyui_gguf"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, custom_node / "__init__.py", submodule_search_locations=[str(custom_node)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    folder_paths.add_model_folder_path("diffusion_models", str(file.parent))
    with torch.inference_mode():
        return sys.modules[name].NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(file.name)[0]


def measure(kind: str, file: Path, custom_node: Path) -> list[float]:
    """Differences: weights from the file's, LoRA'd weights from value + change, the file alone from the MODEL, a student's velocity, a LoRA'd one."""
    from helpers_bridge import lora, lora_change, state
    from helpers_storage import write_gguf
    from helpers_tiny import random_wan
    teacher_of = pack_module("nodes.comfy_bridge.teacher").ComfyTeacher
    kept = write_gguf(file, random_wan(seed=3, ffn_dim=256).state_dict(), kind).weights
    model, found, x = open_with_comfyui_gguf(file, custom_node), [], state()
    velocities = []
    for patched, changes in ((model, {}), (lora(model, LORA), lora_change(model, LORA))):
        teacher = teacher_of(patched)
        weights = dict(teacher.weights())
        found.append(largest(weights, {name: value + changes.get(name, 0) for name, value in kept.items()}))
        student = random_wan(ffn_dim=256)
        student.load_state_dict(weights)
        with torch.no_grad():
            velocities.append(largest({"": student(x[0], 1000 * x[1], x[2].context)}, {"": teacher.velocity(*x)}))
    with open_wan(file) as source:
        return [*found, largest(dict(source.tensors()), dict(teacher_of(model).weights())), *velocities]


def largest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of any tensor, as a share of the largest value in it."""
    if found.keys() != expected.keys():
        raise RuntimeError(f"Not in both: {sorted(found.keys() ^ expected.keys())[:5]}")
    return max(float((found[name].float() - value.float()).abs().max() / value.float().abs().max()) for name, value in expected.items())


def main() -> None:
    if len(sys.argv) != 2 or not (custom_node := Path(sys.argv[1]).absolute()).is_dir():
        raise SystemExit(__doc__)
    open_comfyui()
    sys.path.append(str(ROOT / "tests"))        # the files are those that the tests read
    print("| format | weights | with a LoRA | file alone, bf16 | velocity | with a LoRA |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            print(f"| {kind} | " + " | ".join(f"{value:.1e}" for value in measure(kind, Path(folder) / f"{kind}.gguf", custom_node)) + " |")


if __name__ == "__main__":
    main()
