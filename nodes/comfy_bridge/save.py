"""A student as a file or folder for one reader or many, reported as verified only after a real reader opened it and answered the same."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats import readers
from ...wanlite_model.formats.fp8 import DTYPE as FP8
from ...wanlite_model.formats.gguf_write import write_gguf
from ...wanlite_model.formats.lora import stacked
from ...wanlite_model.formats.model_card import Stated
from ...wanlite_model.formats.pairs import PLAIN, check_pair, rounded
from ...wanlite_model.formats.place import check_name
from ...wanlite_model.formats.saving import SaveReport
from ...wanlite_model.formats.write import save_lora, write_diffusers, write_student
from . import folders
from .load import open_model, open_student
from .other_readers import by_diffusers, by_gguf_node
from .verify import LORA_READER, Recorded, found_out, record, verifier

FOLDERS = ("folder", "diffusers folder")        # what a model card goes with


def save(student: StudentHandle, name: str, *, layout: str, dtype: str, overwrite: bool, stated: Stated = Stated()) -> SaveReport:
    """Writes it where its readers look for it; see EXPORTS. Raises WanLiteError, and then nothing on disk has changed."""
    check_pair(layout, dtype)
    check_name(name)
    if layout == "LoRA" and not (student.loras and student.same_as):
        raise WanLiteError("This student is not a LoRA over its teacher: its blocks were cut, or all its weights were trained.", "",
                           "Save it as a folder or as a single file.")
    recorded = record(student, "fp32" if layout == "LoRA" else dtype)
    report = EXPORTS[layout](student, name, dtype, recorded, stated, overwrite)
    return replace(report, notes=(*report.notes, *_notes(student, report, recorded, stated, layout, dtype)))


def _notes(student: StudentHandle, report: SaveReport, recorded: Recorded, stated: Stated, layout: str, dtype: str) -> Iterator[str]:
    if student.loras and layout != "LoRA":
        yield "Its LoRA is merged into these weights."
    yield from found_out(recorded, dtype)
    if report.verified:
        yield from report.verified.notes
    yield readers.told(student.config, layout, dtype, diffs=layout == "LoRA" and _has_diffs(student))
    if layout == "diffusers folder":
        yield f"In Python: WanTransformer3DModel.from_pretrained({str(report.path)!r}). It is not below ComfyUI's models, since ComfyUI does not read it."
    if layout not in FOLDERS and stated != Stated():
        yield f"Base model, licence and picture go into a folder's model card; a {layout} has none."


def _student(student: StudentHandle, name: str, dtype: str, recorded: Recorded, stated: Stated, overwrite: bool, *, layout: str) -> SaveReport:
    opens_as = PLAIN.get(dtype, torch.float32)
    return write_student(folders.models_folder() / (f"{name}.safetensors" if layout == "single file" else name), config=student.config,
                         tensors=_tensors(student), layout=layout, dtype=PLAIN.get(dtype, FP8), card=student.card, stated=_merged(stated, student),
                         verify=verifier(recorded, lambda file: open_model(file, dtype=opens_as)), overwrite=overwrite,
                         workflow_folder=folders.output_folder("workflows"))


def _diffusers(student: StudentHandle, name: str, dtype: str, recorded: Recorded, stated: Stated, overwrite: bool) -> SaveReport:
    return write_diffusers(folders.output_folder("diffusers") / name, config=student.config, tensors=_tensors(student), dtype=PLAIN[dtype],
                           card=student.card, verify=by_diffusers(recorded, student.config), overwrite=overwrite, stated=_merged(stated, student))


def _gguf(student: StudentHandle, name: str, dtype: str, recorded: Recorded, _: Stated, overwrite: bool) -> SaveReport:
    def expected() -> Iterator[tuple[str, Tensor]]:
        return ((layer, rounded(dtype, layer, tensor)) for layer, tensor in _tensors(student))

    return write_gguf(folders.models_folder() / f"{name}-{dtype}.gguf", config=student.config, read=lambda names: _tensors(student, names), kind=dtype,
                      card=student.card, verify=by_gguf_node(recorded, expected), overwrite=overwrite,
                      workflow_folder=folders.output_folder("workflows"))


def _lora(student: StudentHandle, name: str, dtype: str, recorded: Recorded, _: Stated, overwrite: bool) -> SaveReport:
    """Its LoRAs as one file below models/loras, opened by ComfyUI's own LoRA loader over the student's base."""
    with student.open() as opened:
        lora = stacked(opened.loras)

    def opened_over(file: Path) -> Any:
        return open_student(replace(student, loras=(str(file),)), dtype=torch.float32)

    return save_lora(folders.loras_folder() / f"{name}.safetensors", lora, dtype=PLAIN[dtype], card=student.card,
                     verify=verifier(recorded, opened_over, LORA_READER), overwrite=overwrite)


EXPORTS: dict[str, Callable[..., SaveReport]] = {
    "folder": partial(_student, layout="folder"), "single file": partial(_student, layout="single file"), "diffusers folder": _diffusers,
    "LoRA": _lora, "GGUF": _gguf}


def _merged(stated: Stated, student: StudentHandle) -> Stated:
    return replace(stated, merged=bool(student.loras))


def _has_diffs(student: StudentHandle) -> bool:
    """Whether its LoRAs change norms or biases too."""
    with student.open() as opened:
        return any(lora.diffs for lora in opened.loras)


def _tensors(student: StudentHandle, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Holds the student's file no longer than it is read: on Windows an open file cannot be replaced, and it may be saved onto itself.

    ComfyUI's Cancel ends it: quantising a large student takes minutes.
    """
    with student.open() as opened:
        for item in opened.tensors(names):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield item
