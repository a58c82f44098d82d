"""The bridge's open_model, with ComfyUI's own loader behind it, as one more reader."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from demo.comfy_path import pack_module, put_comfyui_first

from .originals import PACKED, WANS, Place
from .targets import Target, Wrong, alike, honest, reference

SCALES = ("scale_weight", "scale_input", "weight_scale", "input_scale")         # that it adds by itself


def comfy_target(comfyui: Path) -> tuple[Target, type[Exception]]:
    """The reader, and the error that it may raise: that of the pack as ComfyUI imports it."""
    put_comfyui_first(comfyui)
    import comfy.cli_args
    comfy.cli_args.args.cpu = True
    read, error = pack_module("nodes.comfy_bridge.load").open_model, pack_module("wanlite_model.errors").WanLiteError
    return Target(name="open_model in ComfyUI", kinds=(*WANS, *PACKED), read=read, check=_check), error


def _check(place: Place, model: Any) -> None:
    found = model.model.diffusion_model.state_dict()
    files = [place.path] if place.path.is_file() else place.files(".safetensors")
    names = {name for name, value in found.items() if value.is_floating_point() and not name.endswith(SCALES)}
    tensors = honest(files)
    if missing := names - tensors.keys():
        raise Wrong(f"{min(missing)} is not in the file")
    if place.kind in PACKED:            # it keeps them packed
        return
    # What else a quantised file holds is ComfyUI's to judge. It keeps weights in a dtype of its own choice, which may be another for some of them.
    alike({name: found[name] for name in names}, {name: tensors[name].to(found[name].dtype) for name in names})
    if place.same:
        alike(found, {name: value.to(found[name].dtype) for name, value in reference(place).items()})
