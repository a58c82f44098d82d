"""A student's start in every export, and what its module answers with weights rounded as that file rounds them."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wanlite_model.compress.handle import StudentHandle
from wanlite_model.formats.fp8 import DTYPE as FP8
from wanlite_model.formats.gguf_write import write_gguf
from wanlite_model.formats.lora import Lora, write_lora
from wanlite_model.formats.pairs import PLAIN, rounded
from wanlite_model.formats.read import open_wan
from wanlite_model.formats.saving import DIFFUSERS_FILE
from wanlite_model.formats.write import save_lora, write_diffusers, write_student
from wanlite_model.transformer import WanLiteStudent

from .storages import lora_for

FACTORS, DIFFS = "factors", "factors and diffs"         # what the LoRA of a student is made of


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """layout, dtype: as pairs.py calls them. lora: of a student that was trained as one, FACTORS or DIFFS."""
    layout: str
    dtype: str
    lora: str = ""


EXPORTS = {
    **{f"folder {dtype}": Export(layout="folder", dtype=dtype) for dtype in PLAIN},
    "single file bf16": Export(layout="single file", dtype="bf16"),
    "single file fp8": Export(layout="single file", dtype="fp8"),
    "diffusers folder bf16": Export(layout="diffusers folder", dtype="bf16"),
    "LoRA bf16": Export(layout="LoRA", dtype="bf16", lora=FACTORS),
    "LoRA with norms and biases bf16": Export(layout="LoRA", dtype="bf16", lora=DIFFS),
    "merged LoRA, folder bf16": Export(layout="folder", dtype="bf16", lora=DIFFS),
    **{f"GGUF {dtype}": Export(layout="GGUF", dtype=dtype) for dtype in ("Q8_0", "Q5_0", "Q4_0")},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """An export on disk. path: the folder or file. base: the start's folder, over which a LoRA goes."""
    export: Export
    path: Path
    base: Path

    def as_folder(self) -> Path:
        """A folder with this file under the name that readers of folders look for, and a config.json: what somebody may try with it."""
        folder = self.path.with_name("as a folder")
        if not folder.exists():
            folder.mkdir()
            shutil.copyfile(self.path, folder / DIFFUSERS_FILE)
            with open_wan(self.base) as source:
                (folder / "config.json").write_text(json.dumps(source.config.to_json()), encoding="utf-8")
        return folder

    def base_for_diffusers(self) -> Path:
        """The start as a diffusers folder, which is what every kind of WAN is opened from there."""
        folder = self.path.with_name("base for diffusers")
        with open_wan(self.base) as source:
            return write_diffusers(folder, config=source.config, tensors=source.tensors()).path


def with_lora(start: StudentHandle, lora: str, folder: Path) -> StudentHandle:
    """The start with a LoRA of that kind, which stands for a trained one: it is written into the folder, in fp32."""
    if not lora:
        return start
    write_lora(file := folder / f"{lora}.safetensors", lora_for(start.config, seed=2, diffs=lora == DIFFS), dtype=torch.float32)
    return replace(start, loras=(str(file),))


def written(export: Export, student: StudentHandle, folder: Path) -> Written:
    """Writes it below a new folder, with the writer that Save Student uses."""
    folder.mkdir(parents=True)
    layout, dtype, name = export.layout, export.dtype, f"{folder.parent.name} {folder.name}"        # ComfyUI-GGUF looks for it in all folders
    with student.open() as opened:
        given = {"config": student.config, "tensors": opened.tensors()}
        if layout == "GGUF":
            report = write_gguf(folder / f"{name}.gguf", config=student.config, read=opened.tensors, kind=dtype)
        elif layout == "LoRA":
            report = save_lora(folder / f"{name}.safetensors", opened.loras[0], dtype=PLAIN[dtype])
        elif layout == "diffusers folder":
            report = write_diffusers(folder / name, dtype=PLAIN[dtype], **given)
        else:
            report = write_student(folder / (name if layout == "folder" else f"{name}.safetensors"), layout=layout, dtype=PLAIN.get(dtype, FP8), **given)
    return Written(export=export, path=report.path, base=Path(student.folder))


def expected(export: Export, student: StudentHandle) -> WanLiteStudent:
    """Our module in fp32, with the weights that the file holds."""
    with student.open() as opened:
        if export.layout == "LoRA":
            tensors = _rounded_lora(opened.loras[0], PLAIN[export.dtype]).merged(opened.source.tensors())
        else:
            tensors = _rounded(export.dtype, opened.tensors())
        return WanLiteStudent.filled(student.config, tensors, torch.float32, "cpu")


def _rounded(dtype: str, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, rounded(dtype, name, tensor)) for name, tensor in tensors)


def _rounded_lora(lora: Lora, dtype: torch.dtype) -> Lora:
    return Lora(factors={layer: replace(found, down=found.down.to(dtype), up=found.up.to(dtype)) for layer, found in lora.factors.items()},
                diffs={name: diff.to(dtype) for name, diff in lora.diffs.items()})
