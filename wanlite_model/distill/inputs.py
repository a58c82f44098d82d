"""What a run is made from, in its own folder: so that it can be gone on with where the graph is not."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..compress.handle import StudentHandle
from ..config import WanConfig
from ..errors import WanLiteError
from ..files import regular, replace_file
from ..formats.lora import Factors, Lora
from ..formats.write import write_student
from ..prompts import PromptBank
from ..teacher import AbsentTeacher, FileTeacher, Teacher
from .checkpoint import RunFolder
from .checks import check
from .job import DistillJob
from .paths import asked_of

PROMPTS, LATENTS, START_FROM = "prompts.safetensors", "latents.safetensors", "start_from.safetensors"
SCALES = "wanlite.scales"
START, TEACHER, OTHER = "start", "teacher", "other"         # what is prepared: copies, so that the folder can be taken elsewhere


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Inputs:
    """The parts that a run is made from, beside its job and its teacher."""
    student: StudentHandle
    prompts: PromptBank
    latents: Tensor | None = None
    start_from: Lora | None = None


def keep(files: RunFolder, inputs: Inputs, teacher: Teacher, cache_root: Path, other: Teacher | None = None) -> None:
    """Writes into the run folder what is not there yet; the student and the teacher's answers are named, not copied. other: the other expert."""
    folder = files.path
    if not (folder / PROMPTS).exists():
        inputs.prompts.save(folder / PROMPTS)
    if inputs.latents is not None and not (folder / LATENTS).exists():
        replace_file(folder / LATENTS, lambda path: save_file({"latents": inputs.latents.contiguous()}, path))
    if inputs.start_from is not None and not (folder / START_FROM).exists():
        _write_exactly(folder / START_FROM, inputs.start_from)
    both = {TEACHER: teacher, **({} if other is None else {OTHER: other})}
    its = {which: files.noted(which) or {"name": one.name, "config": asdict(one.config)} for which, one in both.items()}
    files.note("student", inputs.student.to_json(), **its, cache=str(Path(cache_root).absolute()))


def prepare(files: RunFolder, job: DistillJob, inputs: Inputs, teacher: Teacher, cache_root: Path,
            file_of: Callable[[Teacher], Path | None] = lambda _: None, other: Teacher | None = None) -> Iterator[str]:
    """Makes the folder complete: with the student's start, and the teacher, or both experts. Yields what it does next.

    file_of: finds the WAN file that holds a teacher's weights as they are; where there is none they are written here, patches merged and
    dequantised. Raises WanLiteError when the job could not be run with these parts, or when the folder is another job's or cannot be written; what
    was there stays as it was.
    """
    inputs = replace(inputs, prompts=inputs.prompts.fitted(teacher.config, job.shape))
    check(job, inputs.student, teacher, inputs.prompts, inputs.latents, inputs.start_from)
    asked_of(job, teacher, other)
    with files.opened(job):
        keep(files, inputs, teacher, cache_root, other)
        yield "copying the start"
        _copy_start(files.path / START, inputs.student)
        for which, one in ((TEACHER, teacher), *([(OTHER, other)] if other else [])):
            if not files.noted(which).keys() & {"path", "merged"}:
                yield from _place(files, job, which, one, file_of)


def _place(files: RunFolder, job: DistillJob, which: str, teacher: Teacher, file_of: Callable[[Teacher], Path | None]) -> Iterator[str]:
    """Notes the teacher's file, or writes one."""
    noted = files.noted(which)
    yield "looking for the teacher's file"
    if (file := file_of(teacher)) is not None:
        files.note(which, {**noted, "path": str(file)})
        return
    yield "writing the teacher"
    place = write_student(files.path / which, config=teacher.config, tensors=teacher.weights(), overwrite=True).path
    merged = FileTeacher(place, shift=job.shift, device=torch.device("cpu")).fingerprint
    files.note(which, {**noted, "merged": merged})


def job_of(files: RunFolder) -> DistillJob:
    """Raises WanLiteError when the folder is no run."""
    noted = files.noted("job") if files.path.is_dir() else None
    if noted is None or files.noted("student") is None:
        raise WanLiteError(f"{files.path.name} is not the folder of a run.", "A run is a folder below output/wanlite/runs that WanLite Distill made.",
                           "Queue the graph with minutes 0 to prepare one, or name another folder.")
    return DistillJob.from_json(noted)


def read(files: RunFolder) -> Inputs:
    """Raises WanLiteError when something that the run is made from is gone."""
    folder, student = files.path, StudentHandle.from_json(files.noted("student"))
    start = folder / START
    if start.exists():
        loras = sorted(start.glob("lora-*.safetensors"))
        with _whole(files):
            [own] = (path for path in start.iterdir() if path not in loras and not path.name.startswith("."))
        student = replace(student, folder=str(own), loras=tuple(map(str, loras)))
    with _whole(files):
        latents = load_file(regular(folder / LATENTS))["latents"].clone() if (folder / LATENTS).exists() else None
        lora = _read_exactly(folder / START_FROM) if (folder / START_FROM).exists() else None
    return Inputs(student=student, prompts=PromptBank.load(folder / PROMPTS), latents=latents, start_from=lora)


def cache_of(files: RunFolder) -> Path:
    """Where the teacher's answers are. Raises WanLiteError when that is not noted."""
    with _whole(files):
        return Path(files.noted("cache"))


@contextmanager
def _whole(files: RunFolder) -> Iterator[None]:
    """What goes wrong inside is the run's own doing. Raises WanLiteError."""
    try:
        yield
    except WanLiteError:
        raise
    except (OSError, SafetensorError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise WanLiteError(f"What run {files.path.name!r} was made from is damaged ({error}).", "", "Queue the run's graph again under a new run name.") from error


def _write_exactly(path: Path, lora: Lora) -> None:
    """As it is in memory: a LoRA file rounds the scale, and the job knows it by its bits."""
    tensors = {f"{leaf} {layer}": getattr(found, leaf).contiguous() for layer, found in lora.factors.items() for leaf in ("down", "up")}
    tensors |= {f"diff {name}": diff.contiguous() for name, diff in lora.diffs.items()}
    scales = json.dumps({layer: found.scale for layer, found in lora.factors.items()})
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={SCALES: scales}))


def _read_exactly(path: Path) -> Lora:
    with safe_open(regular(path), "pt") as stored:
        found = {name: stored.get_tensor(name).clone() for name in stored.keys()}
        scales = json.loads(stored.metadata()[SCALES])
    return Lora(factors={layer: Factors(down=found[f"down {layer}"], up=found[f"up {layer}"], scale=float(scale)) for layer, scale in scales.items()},
                diffs={name.removeprefix("diff "): value for name, value in found.items() if name.startswith("diff ")})


def teacher_of(files: RunFolder, job: DistillJob, device: torch.device, file: Path | None = None, which: str = TEACHER) -> Teacher:
    """The teacher in `file`, or the one that the run knows of, or one that is not there. Raises WanLiteError when the file holds another WAN.

    which: OTHER for the other one of two experts.
    """
    with _whole(files):
        noted: dict[str, Any] = files.noted(which)
        config, name, merged = WanConfig(**noted["config"]), str(noted["name"]), files.path / which
        place = file or (Path(noted["path"]) if "path" in noted else merged if "merged" in noted and merged.exists() else None)
    fingerprint = job.teacher if which == TEACHER else job.other
    if place is None:
        return AbsentTeacher(config, shift=job.shift, fingerprint=fingerprint, name=name, device=device)
    teacher = FileTeacher(place, shift=job.shift, device=device, name=name)
    if teacher.fingerprint not in (fingerprint, noted.get("merged")):
        raise WanLiteError(f"{place.name} is not the teacher of this run: its weights are others.", f"The run was made for {name}.",
                           "Name the file that the graph loaded, without LoRAs and in the same dtype, or queue the graph with minutes 0.")
    teacher.fingerprint = fingerprint           # that of the MODEL whose weights the file holds
    return teacher


def _copy_start(place: Path, student: StudentHandle) -> None:
    """Links the files where they are on the same drive, and copies them where not; none of them is ever written to again."""
    if place.exists():
        return
    new = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    source = Path(student.folder)
    for file in sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]:
        goal = new / source.name / file.name if source.is_dir() else new / file.name
        goal.parent.mkdir(exist_ok=True)
        _link(file, goal)
    for number, lora in enumerate(student.loras):
        _link(Path(lora), new / f"lora-{number}.safetensors")
    os.rename(new, place)


def _link(file: Path, goal: Path) -> None:
    try:
        os.link(file, goal)
    except OSError:
        shutil.copy2(file, goal)
