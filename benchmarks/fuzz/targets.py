"""What reads a spoiled place, and whether what it gave is what the place honestly holds."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wanlite_model.compress.build import create_student
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.compress.loras import read_teacher_lora, write_remapped
from wanlite_model.compress.plan import CompressionPlan
from wanlite_model.config import NAMES, WanConfig
from wanlite_model.distill import inputs
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.inputs import Inputs
from wanlite_model.distill.job import DistillJob
from wanlite_model.formats.keymap import is_diffusers, to_wan_names, wan_shapes
from wanlite_model.formats.lora import Lora, read_lora
from wanlite_model.formats.read import MARKS, PREFIXES, open_wan
from wanlite_model.prompts import PromptBank
from wanlite_model.teacher import FileTeacher
from wanlite_model.transformer import WanLiteStudent

from .. import result_of
from .originals import CONFIG, ENTRY, GGUF, PACKED, SHAPE, WANS, Place

HALF = StudentHandle(folder="", config=CONFIG.resized(num_layers=1, ffn_dim=CONFIG.ffn_dim), fingerprint="",
                     plan=CompressionPlan(keep=(1,), ffn_dim=CONFIG.ffn_dim, method="given", teacher_layers=2, teacher_ffn_dim=CONFIG.ffn_dim))

ALL_WANS = (*WANS, *PACKED, GGUF)


class Wrong(Exception):
    """What was read is not what is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """read: what is watched. check: raises Wrong on what it gave, and is not watched. writes: whether it may change the place."""
    name: str
    kinds: tuple[str, ...]
    read: Callable[[Path], Any]
    check: Callable[[Place, Any], None]
    writes: bool = False


def expect(right: bool, told: str) -> None:
    if not right:
        raise Wrong(told)


def stored(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of these files, by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys()}
        except (OSError, SafetensorError, RuntimeError) as error:
            raise Wrong(f"the safetensors library refuses {file.name}: {error}") from error
    return found


def unpacked(files: Iterable[Path]) -> dict[str, Tensor]:
    """All weights of these files: what is kept in fewer bits times its scale, in bfloat16; without what says so."""
    tensors, layers = stored(files), set()
    for file in files:
        with safe_open(file, "pt") as opened:
            layers |= json.loads((opened.metadata() or {}).get("_quantization_metadata", '{"layers": {}}'))["layers"].keys()
    layers |= {name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")}
    scales = {f"{layer}.weight": f"{layer}.weight_scale" for layer in layers}
    if "scaled_fp8" in tensors:
        scales |= {name.replace(".scale_weight", ".weight"): name for name in tensors if name.endswith(".scale_weight")}
    found = {name: value for name, value in tensors.items() if name not in scales.values() and name != "scaled_fp8" and not name.endswith(".comfy_quant")}
    return {name: (value.float() * tensors[scales[name]].float() if name in scales else value).bfloat16() if value.dtype.itemsize == 1 else value
            for name, value in found.items()}


def unpacked_gguf(path: Path) -> dict[str, Tensor]:
    """The same of a GGUF file, by the gguf library."""
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return {tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(tensor.shape.tolist()[::-1])
            .to(plain.get(tensor.tensor_type.name, torch.bfloat16)) for tensor in gguf.GGUFReader(path).tensors}


def honest(files: Iterable[Path]) -> dict[str, Tensor]:
    """The same under WAN's names."""
    [*files] = files
    tensors = unpacked_gguf(files[0]) if files[0].suffix == ".gguf" else unpacked(files)
    prefix = next((prefix for prefix in PREFIXES if any(prefix + mark in tensors for mark in MARKS)), "")
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return {to_wan_names(tensors)[name]: value for name, value in tensors.items()} if is_diffusers(tensors) else tensors


def alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raises Wrong unless both have the same names with the same numbers; what is no number may be another such."""
    expect(one.keys() == other.keys(), f"names differ: {sorted(one.keys() ^ other.keys())[:3]}")
    for name, value in one.items():
        same = value.shape == other[name].shape and torch.allclose(value.float(), other[name].float(), rtol=0, atol=0, equal_nan=True)
        expect(same, f"{name!r} differs")


def _opened(path: Path) -> tuple[WanConfig, dict[str, Tensor], list[Path]]:
    with open_wan(path) as source:
        return source.config, dict(source.tensors()), list(source.files) or [path]


def _check_opened(place: Place, found: tuple[WanConfig, dict[str, Tensor], list[Path]]) -> None:
    config, tensors, files = found
    alike(tensors, honest(files))
    expect({name: tuple(value.shape) for name, value in tensors.items()} == wan_shapes(config), "the architecture is not that of the tensors")
    if place.same:
        expect(config == CONFIG, f"the architecture became {config}")
        alike(tensors, reference(place))


def reference(place: Place) -> dict[str, Tensor]:
    """The weights of its original, by WAN's names."""
    original = place.home / "originals" / place.kind / ENTRY[place.kind]
    return honest(sorted(original.glob("*.safetensors")) if original.is_dir() else [original])


def weights_of(place: Place) -> dict[str, Tensor]:
    """Of a place that was read well: of all its files but those that no index names."""
    return _opened(place.path)[1]


def _check_student(place: Place, student: WanLiteStudent) -> None:
    expect(isinstance(student.legacy, dict), f"legacy is {student.legacy!r:.99}")
    tensors = {name: value.to(next(student.parameters()).dtype) for name, value in weights_of(place).items()}
    alike(student.state_dict(), tensors)
    if place.same:
        alike(student.state_dict(), {name: value.to(next(student.parameters()).dtype) for name, value in reference(place).items()})


def _check_handle(place: Place, handle: StudentHandle) -> None:
    expect(round_trip(handle) == handle, "its note says something else")
    expect(len(handle.plan.removed) == handle.plan.teacher_layers - len(handle.plan.keep), "the plan does not add up")
    if place.same and place.path.exists():
        expect(handle.config == CONFIG, f"the architecture became {handle.config}")


def round_trip(handle: StudentHandle) -> StudentHandle:
    try:
        return StudentHandle.from_json(json.loads(json.dumps(handle.to_json(), allow_nan=False)))
    except ValueError as error:
        raise Wrong(f"it cannot be noted: {error}") from error


def _check_lora(place: Place, lora: Lora) -> None:
    tensors = stored([place.path])
    heard = {name: value for name, value in tensors.items() if "modulation" not in name and not name.endswith(("diff_m", ".alpha"))}
    expect(2 * len(lora.factors) + len(lora.diffs) == len(heard), "some of its tensors were passed over")
    expect(all(math.isfinite(found.scale) for found in lora.factors.values()), "a scale is no number")
    values = [value for found in lora.factors.values() for value in (found.down, found.up)] + list(lora.diffs.values())
    for value in values:
        expect(any(value.shape == other.shape and torch.allclose(value.float(), other.float(), rtol=0, atol=0, equal_nan=True) for other in heard.values()),
               "a tensor is not there")
    if place.same:
        expect(sorted(lora.factors) == ["blocks.0.ffn.2", "blocks.1.cross_attn.q"] and all(found.scale == 0.5 for found in lora.factors.values()),
               "another LoRA")


def _moved(path: Path) -> Path:
    """A LoRA for a teacher of two blocks, moved to a student that has the second."""
    lora, new = read_teacher_lora(path, HALF), path.with_name("remapped.safetensors")
    write_remapped(new, lora, HALF)
    return new


def _check_moved(place: Place, new: Path) -> None:
    there = list(stored([place.path]).values())
    for name, value in stored([new]).items():
        expect(any(value.shape == other.shape and torch.equal(value.float(), other.float()) for other in there), f"{name!r} is not there")


def _check_bank(place: Place, bank: PromptBank) -> None:
    _check_prompts(bank)
    path = place.path if place.kind == "bank" else place.path / inputs.PROMPTS
    tensors = stored([path])
    for index, context in enumerate((*bank.contexts, bank.negative)):
        there = tensors[f"prompt.{index}" if index < len(bank) else "negative"]
        expect(torch.equal(there.reshape(-1, there.shape[-1])[:len(context)], context), f"embedding {index} differs")
    if place.same:
        expect(bank.fingerprint == PromptBank.load(place.home / "originals" / place.kind / path.relative_to(place.folder)).fingerprint, "another bank")


def _check_prompts(bank: PromptBank) -> None:
    expect(all(isinstance(text, str) for text in (*bank.prompts, bank.negative_text)), "a prompt is no text")
    expect(all(len(context) and context.isfinite().all() for context in (*bank.contexts, bank.negative)), "an embedding is empty or not finite")
    bank.cond(range(len(bank)))
    bank.fitted(CONFIG, SHAPE)


def given(path: Path) -> Any:
    """The value in a JSON file; that it can be read is not what is tried."""
    return json.loads(path.read_text(encoding="utf-8"))


def _check_config(place: Place, config: WanConfig) -> None:
    """What the file says of a number, under whatever name, is what came of it."""
    told, said = config.to_json(), given(place.path)
    wrong = [name for names in NAMES.values() for name in names if name and said.get(name) is not None and said[name] != told.get(name)]
    expect(not wrong, f"{wrong[:1]} was passed over")
    expect(all(type(getattr(config, field.name)).__name__ == field.type for field in fields(config)), "a value is of the wrong kind")


def _student_of(path: Path) -> WanLiteStudent:
    with torch.device("meta"):
        return WanLiteStudent(given(path))


def _check_built(place: Place, student: WanLiteStudent) -> None:
    expect({name: tuple(value.shape) for name, value in student.state_dict().items()} == wan_shapes(student.wan), "the architecture is not that of the tensors")


def _check_job(place: Place, job: DistillJob) -> None:
    kinds = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    for value in (job, job.recipe, *([job.role] if job.role else [])):
        wrong = [field.name for field in fields(value) if field.type in kinds and type(getattr(value, field.name)) not in kinds[field.type]]
        expect(not wrong, f"{wrong[:1]} is of the wrong kind")
    expect(len(job.shape) == 4 and all(type(side) is int and side > 0 for side in job.shape), "the shape is none")
    expect(all(isinstance(value, str) for value in (job.student, job.teacher, job.prompts)), "a fingerprint is no text")
    try:
        json.dumps(asdict(job), allow_nan=False)
    except ValueError as error:
        raise Wrong(f"it cannot be noted: {error}") from error


def _check_note(place: Place, handle: StudentHandle) -> None:
    expect(round_trip(handle) == handle, "its note says something else")
    expect(all(isinstance(text, str) for text in (handle.folder, handle.fingerprint, handle.same_as, *handle.loras)), "a path or a fingerprint is no text")
    expect(all(type(getattr(handle.config, field.name)).__name__ == field.type for field in fields(handle.config)), "the config has a value of the wrong kind")
    handle.file, handle.plan.removed, handle.plan.prunes_nothing


def _run_of(path: Path) -> tuple[DistillJob, Inputs]:
    """As `python -m wanlite_model run` begins."""
    files = RunFolder(path)
    job = inputs.job_of(files)
    parts = inputs.read(files)
    inputs.teacher_of(files, job, torch.device("cpu"))
    inputs.cache_of(files)
    files.rows("step")
    return job, parts


def _check_run(place: Place, found: tuple[DistillJob, Inputs]) -> None:
    job, parts = found
    _check_job(place, job)
    _check_note(place, parts.student)
    _check_bank(place, parts.prompts)
    expect(parts.latents is None or isinstance(parts.latents, Tensor), "the latents are none")
    for factors in (parts.start_from.factors if parts.start_from else {}).values():
        expect(isinstance(factors.scale, (int, float)) and math.isfinite(factors.scale), "a scale is no number")
        expect(factors.up.shape[1] == len(factors.down), "its factors do not belong together")


def _start_of(path: Path) -> StudentHandle:
    """As Create Student finds the start that an earlier request left."""
    originals = path.parent.parent / "originals"
    teacher = FileTeacher(originals / "file" / ENTRY["file"], shift=3.0, device=torch.device("cpu"))
    bank = PromptBank.load(originals / "bank" / ENTRY["bank"])
    return result_of(create_student(teacher, bank, SHAPE, depth=1, method="interleaved", folder=path))[0]


def _check_start(place: Place, handle: StudentHandle) -> None:
    round_trip(handle)


TARGETS = (
    Target(name="open_wan and every tensor", kinds=ALL_WANS, read=_opened, check=_check_opened),
    Target(name="WanLiteStudent.from_pretrained", kinds=ALL_WANS, read=WanLiteStudent.from_pretrained, check=_check_student),
    Target(name="StudentHandle.of", kinds=ALL_WANS, read=StudentHandle.of, check=_check_handle),
    Target(name="read_lora", kinds=("lora",), read=lambda path: read_lora(path, CONFIG), check=_check_lora),
    Target(name="a LoRA moved to a student", kinds=("lora",), read=_moved, check=_check_moved, writes=True),
    Target(name="PromptBank.load", kinds=("bank",), read=PromptBank.load, check=_check_bank),
    Target(name="WanConfig.from_dict", kinds=("config",), read=lambda path: WanConfig.from_dict(given(path)), check=_check_config),
    Target(name="WanLiteStudent(dict)", kinds=("config",), read=_student_of, check=_check_built),
    Target(name="DistillJob.from_json", kinds=("job",), read=lambda path: DistillJob.from_json(given(path)), check=_check_job),
    Target(name="StudentHandle.from_json", kinds=("note",), read=lambda path: StudentHandle.from_json(given(path)), check=_check_note),
    Target(name="a run's folder", kinds=("run",), read=_run_of, check=_check_run),
    Target(name="a start that is there", kinds=("start",), read=_start_of, check=_check_start, writes=True),
)
