"""A student as a file or folder for one reader or many, reported as verified only after a real reader opened it and answered the same."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import torch
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats import readers
from ...wanlite_model.formats.card import StudentCard
from ...wanlite_model.formats.container import read_header
from ...wanlite_model.formats.fp8 import DTYPE as FP8
from ...wanlite_model.formats.gguf_write import write_gguf
from ...wanlite_model.formats.lora import stacked
from ...wanlite_model.formats.model_card import Stated, card_files
from ...wanlite_model.formats.pairs import PLAIN, check_pair, rounded
from ...wanlite_model.formats.place import check_name
from ...wanlite_model.formats.same import same_beside, same_lora, same_student
from ...wanlite_model.formats.saving import DIFFUSERS_FILE, MODEL_FILE, WORKFLOW_END, SaveReport, check_free, provenance
from ...wanlite_model.formats.workflow import stock_workflow
from ...wanlite_model.formats.write import save_lora, texts_of, write_diffusers, write_student
from . import folders
from .disk import check_present
from .load import open_model, open_student
from .other_readers import by_diffusers, by_gguf_node
from .verify import LORA_READER, Recorded, found_out, record, verifier

FOLDERS = {"folder": MODEL_FILE, "diffusers folder": DIFFUSERS_FILE}        # what a model card goes with, and where the weights are in it

_saved: set[Path] = set()       # by this process: a graph that is queued again takes the save from ComfyUI's cache, and is not to be refused


class Target(NamedTuple):
    """Where a student goes, as a folder or a file, and its workflow, which is None for what no stock loader opens as a model."""
    path: Path
    workflow: Path | None = None

    @classmethod
    def of(cls, name: str, layout: str, dtype: str) -> Target:
        if layout == "diffusers folder":
            return cls(folders.output_folder("diffusers") / name)
        if layout == "LoRA":
            return cls(folders.loras_folder() / f"{name}.safetensors")
        if layout == "folder":
            return cls(folders.models_folder() / name, folders.models_folder() / name / (name + WORKFLOW_END))
        file = f"{name}-{dtype}.gguf" if layout == "GGUF" else f"{name}.safetensors"
        return cls(folders.models_folder() / file, folders.output_folder("workflows") / (os.path.splitext(file)[0] + WORKFLOW_END))

    def check_free(self, overwrite: bool) -> None:
        """Raises WanLiteError when a name is taken, or when overwriting would remove what WanLite did not write."""
        inside = self.workflow is not None and self.path in self.workflow.parents
        check_free(self.path, None if inside else self.workflow, overwrite)


def check_target(name: str, layout: str, dtype: str, overwrite: bool) -> None:
    """Raises WanLiteError when every student would be refused under this name; what this process saved there may be the student that is queued again."""
    target = Target.of(name, layout, dtype)
    target.check_free(overwrite or target.path in _saved)


def save(student: StudentHandle, name: str, *, layout: str, dtype: str, overwrite: bool, stated: Stated = Stated()) -> SaveReport:
    """Writes it where its readers look for it; see EXPORTS. Where it is already there as it would be written, nothing is.

    Raises WanLiteError, and then nothing on disk has changed.
    """
    check_pair(layout, dtype)
    check_name(name)
    check_present(student)
    if layout == "LoRA" and not (student.loras and student.same_as):
        raise WanLiteError("This student is not a LoRA over its teacher: its blocks were cut, or all its weights were trained.", "",
                           "Save it as a folder or as a single file.")
    target = Target.of(name, layout, dtype)
    if _is_there(student, target, layout, dtype, stated):
        report = _was_there(target, layout, dtype)
        report = replace(report, notes=tuple(_openers(student, report, layout, dtype)))
    else:
        target.check_free(overwrite)            # refused here, before a forward is computed
        recorded = record(student, "fp32" if layout == "LoRA" else dtype)
        report = EXPORTS[layout](student, target, dtype, recorded, stated, overwrite)
        report = replace(report, notes=(*report.notes, *_notes(student, report, recorded, stated, layout, dtype)))
    _saved.add(target.path)
    return report


def _is_there(student: StudentHandle, target: Target, layout: str, dtype: str, stated: Stated) -> bool:
    """Whether a save would write what is there, model card and workflow included."""
    path, config, card = target.path, student.config, student.card
    if not path.exists():
        return False
    if layout == "LoRA":
        with student.open() as opened:
            return same_lora(path, stacked(opened.loras), config=config, card=card, dtype=PLAIN[dtype])
    named = os.path.join(path.name, MODEL_FILE) if layout == "folder" else path.name
    graph = stock_workflow(named, card or StudentCard(), config)
    texts = texts_of(layout, config, provenance(card), _size(target, layout))
    files = card_files(path.name, _merged(stated, student), config=config, card=card, layout=layout, dtype=PLAIN[dtype]) if layout in FOLDERS else {}
    return (same_beside({path / name: content for name, content in files.items()},
                        {**{path / name: text for name, text in texts.items()}, **({target.workflow: graph or None} if target.workflow else {})})
            and same_student(path, config=config, card=card, dtype=dtype, tensors=partial(_tensors, student)))


def _size(target: Target, layout: str) -> int:
    """Bytes of the weights in a folder that is there."""
    file = target.path / FOLDERS.get(layout, "")
    return sum(entry.end - entry.start for entry in read_header(file).entries.values()) if layout in FOLDERS and file.is_file() else 0


def _was_there(target: Target, layout: str, dtype: str) -> SaveReport:
    file = target.path / FOLDERS[layout] if layout in FOLDERS else target.path
    told = f"{target.path.name} was there already: this very student as a {layout} in {dtype}. Nothing was written."
    return SaveReport(path=target.path, file=file, bytes=file.stat().st_size, verified=None, sentence=told, workflow=target.workflow)


def _notes(student: StudentHandle, report: SaveReport, recorded: Recorded, stated: Stated, layout: str, dtype: str) -> Iterator[str]:
    if student.loras and layout != "LoRA":
        yield "Its LoRA is merged into these weights."
    yield from found_out(recorded, dtype)
    if report.verified:
        yield from report.verified.notes
    yield from _openers(student, report, layout, dtype)
    if layout not in FOLDERS and stated != Stated():
        yield f"Base model, licence and picture go into a folder's model card; a {layout} has none."


def _openers(student: StudentHandle, report: SaveReport, layout: str, dtype: str) -> Iterator[str]:
    yield readers.told(student.config, layout, dtype, diffs=layout == "LoRA" and _has_diffs(student))
    if layout == "diffusers folder":
        yield f"In Python: WanTransformer3DModel.from_pretrained({str(report.path)!r}). It is not below ComfyUI's models, since ComfyUI does not read it."


def _student(student: StudentHandle, target: Target, dtype: str, recorded: Recorded, stated: Stated, overwrite: bool, *, layout: str) -> SaveReport:
    opens_as = PLAIN.get(dtype, torch.float32)
    return write_student(target.path, config=student.config, tensors=_tensors(student), layout=layout, dtype=PLAIN.get(dtype, FP8), card=student.card,
                         stated=_merged(stated, student), verify=verifier(recorded, lambda file: open_model(file, dtype=opens_as)),
                         overwrite=overwrite, workflow_folder=target.workflow.parent)


def _diffusers(student: StudentHandle, target: Target, dtype: str, recorded: Recorded, stated: Stated, overwrite: bool) -> SaveReport:
    return write_diffusers(target.path, config=student.config, tensors=_tensors(student), dtype=PLAIN[dtype],
                           card=student.card, verify=by_diffusers(recorded, student.config), overwrite=overwrite, stated=_merged(stated, student))


def _gguf(student: StudentHandle, target: Target, dtype: str, recorded: Recorded, _: Stated, overwrite: bool) -> SaveReport:
    def expected() -> Iterator[tuple[str, Tensor]]:
        return ((layer, rounded(dtype, layer, tensor)) for layer, tensor in _tensors(student))

    return write_gguf(target.path, config=student.config, read=lambda names: _tensors(student, names), kind=dtype,
                      card=student.card, verify=by_gguf_node(recorded, expected), overwrite=overwrite,
                      workflow_folder=target.workflow.parent)


def _lora(student: StudentHandle, target: Target, dtype: str, recorded: Recorded, _: Stated, overwrite: bool) -> SaveReport:
    """Its LoRAs as one file below models/loras, opened by ComfyUI's own LoRA loader over the student's base."""
    with student.open() as opened:
        lora = stacked(opened.loras)

    def opened_over(file: Path) -> Any:
        return open_student(replace(student, loras=(str(file),)), dtype=torch.float32)

    return save_lora(target.path, lora, dtype=PLAIN[dtype], card=student.card,
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
