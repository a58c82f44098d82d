"""A MODEL from a file or folder, as ComfyUI's own loader makes it, with its shift set as ModelSamplingSD3 sets it."""
from __future__ import annotations

import json
import logging
import math
import mmap
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.container import DTYPES, read_header
from ...wanlite_model.formats.read import FLOATS, QUANTISED, WanFile, open_wan
from ...wanlite_model.teacher import Teacher, fingerprint_tensors
from . import folders

log = logging.getLogger(__name__)


def open_model(path: Path, shift: float | None = None, dtype: torch.dtype | None = None) -> Any:
    """The MODEL in a .safetensors file, or in a WAN or diffusers folder. shift: None leaves ComfyUI's default of 8.

    A single file goes to the stock loader, quantised or not; a plain one is checked before with the config.json beside it, since ComfyUI
    fills what is missing with whatever memory holds, and never reads the other. Raises WanLiteError when it is not a whole WAN.
    """
    options = {} if dtype is None else {"dtype": dtype}
    file = _stock_file(path)
    if file is not None:
        _check(path, file)
        try:
            model = comfy.sd.load_diffusion_model(str(file), model_options=options)
        except (RuntimeError, KeyError, ValueError, AssertionError, ZeroDivisionError) as error:
            log.warning("ComfyUI's loader on %s: %s", file.name, error)
            raise WanLiteError(f"ComfyUI cannot open {file.name} as a model.", "", "Choose a WAN file from models/diffusion_models.") from error
    else:
        with open_wan(path) as source:      # shards or diffusers names: newer ComfyUIs cannot load these again from disk by themselves
            model = comfy.sd.load_diffusion_model_state_dict(_mapped(source), model_options=options)
    return model if shift is None else with_shift(model, shift)


def open_student(student: StudentHandle, teacher: Any = None, dtype: torch.dtype | None = None) -> Any:
    """The MODEL of a student, its LoRAs laid over it by ComfyUI's own loader, its shift set.

    teacher: a MODEL whose weights are those that the student's LoRAs lie over; then nothing is opened a second time.
    """
    shift = student.card.shift if student.card else None
    model = open_model(student.file, dtype=dtype) if teacher is None else teacher
    for path in student.loras:
        model = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(path, safe_load=True), 1.0, 0.0)[0]
    return model if shift is None else with_shift(model, shift)


def with_shift(model: Any, shift: float) -> Any:
    """A clone of the MODEL that samples with this shift."""
    return ModelSamplingSD3().patch(model, shift)[0]


def reload_note(path: Path) -> tuple[str, ...]:
    """What a user should know of a MODEL that open_model put together itself."""
    return () if _stock_file(path) else (
        "Made of shards or of diffusers names: newer ComfyUIs cannot load such a MODEL from disk a second time, as some of their nodes want to. "
        "Should one complain, open this folder with WanLite Load Student, write it as one file with WanLite Save Student, and load that.",)


def file_of(teacher: Teacher) -> Path | None:
    """The model file that holds this teacher's weights as they are: unpatched, in the same dtype. Only those of its architecture are read."""
    for path in filter(None, map(folders.model_path, folders.model_names())):
        try:
            with open_wan(path) as source:
                if source.config == teacher.config and fingerprint_tensors(source.tensors()) == teacher.fingerprint:
                    return path
        except WanLiteError:
            continue            # no WAN, or a quantised one
    return None


def _mapped(source: WanFile) -> dict[str, Tensor]:
    """All tensors as ComfyUI's own loader has them, mapped: ComfyUI copies them into its model, and memory would hold both."""
    maps = {path: mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) for path, file in source.files.items()}
    return {name: torch.frombuffer(maps[place.path], dtype=DTYPES[place.entry.dtype], count=math.prod(place.entry.shape),
                                   offset=place.entry.start).reshape(place.entry.shape) for name, place in source.places.items()}


def _check(path: Path, file: Path) -> None:
    """Raises WanLiteError on a broken container, and on a WAN in float dtypes that is not whole or not what its config.json says."""
    entries = read_header(file).entries
    if not any(name.endswith(QUANTISED) or entry.dtype not in FLOATS for name, entry in entries.items()):
        with open_wan(path):
            pass


def _stock_file(path: Path) -> Path | None:
    """What the stock loader can take: the file itself, or the one file of a folder in WAN's own names."""
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 and _is_wans(path / "config.json") else None


def _is_wans(config: Path) -> bool:
    """Whether it says so; one that cannot be read does not, and open_wan tells the user."""
    try:
        return json.loads(config.read_text(encoding="utf-8"))["_class_name"] == "WanModel"
    except (OSError, ValueError, KeyError, TypeError):
        return False
