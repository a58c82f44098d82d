"""Students as safetensors: streamed into a temporary place, checked, verified, then put in place at once."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from ..config import WanConfig
from ..errors import WanLiteError
from ..files import patiently
from . import fp8
from .card import StudentCard, header
from .container import Writer
from .keymap import key_map, rows_of, wan_shapes
from .lora import Lora, write_lora
from .model_card import Stated, write_card
from .pairs import check_pair
from .place import check_name
from .saving import (DIFFUSERS_FILE, INDEX_FILE, MODEL_FILE, WORKFLOW_END, SaveReport, Verified, check_free, provenance, put, saved, stem, verdict,
                     write_text_json)
from .workflow import stock_workflow

__all__ = ["MODEL_FILE", "SaveReport", "Verified", "save_lora", "write_diffusers", "write_student"]


def write_student(destination: Path, *, config: WanConfig, tensors: Iterable[tuple[str, Tensor]],
                  layout: Literal["folder", "single file"] = "folder", dtype: torch.dtype | None = None,
                  card: StudentCard | None = None, legacy: Mapping[str, Any] | None = None, image_size: Any = None,
                  verify: Callable[[Path], Verified] | None = None, overwrite: bool = False,
                  workflow_folder: Path | None = None, stated: Stated | None = None) -> SaveReport:
    """Writes a WAN that every reader opens, as a folder, or as `<name>.safetensors` with nothing beside it.

    tensors: (name, tensor), taken one at a time. dtype: None keeps each tensor's; float8_e4m3fn quantises a single file's blocks, for ComfyUI
    alone. verify: opens the new file before it is put in place; what it raises ends the save. workflow_folder: where a single file's workflow
    goes (a folder holds its own). stated: puts a model card into the folder. Raises WanLiteError, and then nothing on disk has changed.
    """
    if layout not in ("folder", "single file"):
        raise WanLiteError(f"layout is {layout!r}.", "It is 'folder' or 'single file'.")
    check_pair(layout, fp8.NAME if dtype == fp8.DTYPE else "bf16")
    destination, single = Path(destination).absolute(), layout == "single file"
    name = check_name(stem(destination, ".safetensors") if single else destination.name)
    graph = stock_workflow(destination.name if single else os.path.join(name, MODEL_FILE), card or StudentCard(), config)
    home = (workflow_folder and Path(workflow_folder).absolute()) if single else destination
    workflow = home / (name + WORKFLOW_END) if home else None
    check_free(destination, workflow if single else None, overwrite)
    said = provenance(card, legacy=dict(legacy) if legacy else None, image_size=image_size)

    def write(new: Path) -> int:
        if single:
            return write_model(new, wan_shapes(config), tensors, dtype, header(said))
        new.mkdir()
        size = write_model(new / MODEL_FILE, wan_shapes(config), tensors, dtype, header(said))
        for name, text in texts_of(layout, config, said, size, image_size).items():
            write_text_json(new / name, text)
        if graph:
            write_text_json(new / workflow.name, graph)
        write_card(new, stated, config=config, card=card, layout=layout, dtype=dtype)
        return size

    size, verified = put(destination, write, verify and (lambda new: verify(new if single else new / MODEL_FILE)),
                         {workflow: lambda path: write_text_json(path, graph)} if single and graph and workflow else {})
    return SaveReport(path=destination, file=destination if single else destination / MODEL_FILE, bytes=size, verified=verified,
                      sentence=saved(destination.name, config, size, verified), workflow=workflow if graph else None)


def write_diffusers(destination: Path, *, config: WanConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None,
                    card: StudentCard | None = None, verify: Callable[[Path], Verified] | None = None, overwrite: bool = False,
                    stated: Stated | None = None) -> SaveReport:
    """Writes the folder that diffusers' WanTransformer3DModel.from_pretrained takes, in diffusers' names. verify is given the folder.

    Otherwise as write_student; ComfyUI does not read these names, so it belongs outside its model folders.
    """
    destination = Path(destination).absolute()
    check_name(destination.name)
    check_free(destination, None, overwrite)
    said, names = provenance(card), key_map("wan", "diffusers", config.num_layers, rows_of(config))

    def write(new: Path) -> int:
        new.mkdir()
        size = write_model(new / DIFFUSERS_FILE, {names[name]: shape for name, shape in wan_shapes(config).items()},
                           ((names.get(name, name), tensor) for name, tensor in tensors), dtype, header(said))
        for name, text in texts_of("diffusers folder", config, said, size).items():
            write_text_json(new / name, text)
        write_card(new, stated, config=config, card=card, layout="diffusers folder", dtype=dtype)
        return size

    size, verified = put(destination, write, verify)
    return SaveReport(path=destination, file=destination / DIFFUSERS_FILE, bytes=size, verified=verified,
                      sentence=saved(destination.name, config, size, verified))


def texts_of(layout: str, config: WanConfig, said: Mapping[str, Any], size: int, image_size: Any = None) -> dict[str, Any]:
    """{name: what is in it} of the JSON texts that a folder's readers ask for; of what is one file, none. said: of provenance. size: bytes of the weights."""
    if layout == "folder":
        return {"config.json": {**config.to_json(), "image_size": image_size, "_wanlite": said},
                INDEX_FILE: {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(wan_shapes(config), MODEL_FILE)}}
    if layout == "diffusers folder":
        return {"config.json": {"_class_name": "WanTransformer3DModel", **config.to_diffusers(), "qk_norm": "rms_norm_across_heads", "_wanlite": said}}
    return {}


def save_lora(destination: Path, lora: Lora, *, dtype: torch.dtype = torch.bfloat16, card: StudentCard | None = None,
              verify: Callable[[Path], Verified] | None = None, overwrite: bool = False) -> SaveReport:
    """Writes `<name>.safetensors` under the keys that ComfyUI's LoRA loader takes; otherwise as write_student does."""
    destination = Path(destination).absolute()
    check_name(stem(destination, ".safetensors"))
    check_free(destination, None, overwrite)
    size, verified = put(destination, lambda new: write_lora(new, lora, dtype=dtype, card=card), verify)
    told = f"Saved {destination.name}: a LoRA on {len(lora.factors)} layers, {size / 2**20:,.1f} MiB"
    return SaveReport(path=destination, file=destination, bytes=size, verified=verified, sentence=verdict(told, verified))


def write_model(file: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None,
                metadata: Mapping[str, str]) -> int:
    """Streams (name, tensor) of these shapes into a new file, and reads its header back with the library that every reader uses. Its bytes."""
    metadata = {"format": "pt", **metadata}
    if dtype == fp8.DTYPE:
        shapes, tensors, dtype, metadata = fp8.shapes(shapes), fp8.encoded(tensors), None, {**metadata, **fp8.metadata(shapes)}
    part = file.with_suffix(".part")                    # no loader lists this ending while it is being written
    with Writer(part, shapes, metadata) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor, dtype)
            del tensor                                  # before the next one is made: one at a time
        size = writer.finish()
    patiently(os.rename, part, file)
    # That library must agree with our own writer. Its "pt" would map the file to be written to, which Windows, and Linux under a limit, count as
    # so much memory.
    with safe_open(file, framework="np") as reference:
        found = {name: tuple(reference.get_slice(name).get_shape()) for name in reference.keys()}
    if found != shapes:
        raise WanLiteError(f"{file.name} reads back differently from what was written.", "", "Check the disk, then save again.")
    return size
