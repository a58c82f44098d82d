"""A student into ComfyUI's model folder, reported as verified only after the stock loader opened it and answered the same."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.formats.place import check_name
from ...wanlite_model.formats.write import SaveReport, write_student
from . import folders, memory
from .verify import record, verifier

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def save(student: StudentHandle, name: str, *, layout: str, dtype: str, overwrite: bool) -> SaveReport:
    """Writes it below models/diffusion_models. Raises WanLiteError, and then nothing on disk has changed."""
    destination = folders.models_folder() / (f"{check_name(name)}.safetensors" if layout == "single file" else check_name(name))
    recorded = record(student, DTYPES[dtype])
    memory.release()                                        # our copy is gone before ComfyUI makes its own
    return write_student(destination, config=student.config, tensors=_tensors(student), layout=layout, dtype=DTYPES[dtype], card=student.card,
                         verify=verifier(recorded), overwrite=overwrite, workflow_folder=folders.output_folder("workflows"))


def _tensors(student: StudentHandle) -> Iterator[tuple[str, Tensor]]:
    """Holds the student's file no longer than it is read: on Windows an open file cannot be replaced, and it may be saved onto itself."""
    with student.open() as opened:
        yield from opened.tensors()
