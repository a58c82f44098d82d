"""A student into ComfyUI's model folder, reported as verified only after the stock loader opened it and answered the same."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.lora import stacked
from ...wanlite_model.formats.place import check_name
from ...wanlite_model.formats.write import SaveReport, Verified, save_lora, write_student
from . import folders
from .load import open_student
from .verify import LORA_READER, record, verifier

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def save(student: StudentHandle, name: str, *, layout: str, dtype: str, overwrite: bool) -> SaveReport:
    """Writes it below models/diffusion_models. Raises WanLiteError, and then nothing on disk has changed."""
    if layout == "LoRA":
        return _save_lora(student, folders.loras_folder() / f"{check_name(name)}.safetensors", DTYPES[dtype], overwrite)
    destination = folders.models_folder() / (f"{check_name(name)}.safetensors" if layout == "single file" else check_name(name))
    recorded = record(student, DTYPES[dtype])
    return write_student(destination, config=student.config, tensors=_tensors(student), layout=layout, dtype=DTYPES[dtype], card=student.card,
                         verify=verifier(recorded), overwrite=overwrite, workflow_folder=folders.output_folder("workflows"))


def _save_lora(student: StudentHandle, destination: Path, dtype: torch.dtype, overwrite: bool) -> SaveReport:
    """Its LoRAs as one file below models/loras, opened by ComfyUI's own LoRA loader over the student's base before it is put in place."""
    if not (student.loras and student.same_as):
        raise WanLiteError("This student is not a LoRA over its teacher: its blocks were cut, or all its weights were trained.", "",
                           "Save it as a folder or as a single file.")
    recorded = record(student, torch.float32)
    with student.open() as opened:
        lora = stacked(opened.loras)

    def verify(file: Path) -> Verified:
        return verifier(recorded, LORA_READER, lambda: open_student(replace(student, loras=(str(file),)), dtype=torch.float32))(file)

    return save_lora(destination, lora, dtype=dtype, card=student.card, verify=verify, overwrite=overwrite)


def _tensors(student: StudentHandle) -> Iterator[tuple[str, Tensor]]:
    """Holds the student's file no longer than it is read: on Windows an open file cannot be replaced, and it may be saved onto itself."""
    with student.open() as opened:
        yield from opened.tensors()
