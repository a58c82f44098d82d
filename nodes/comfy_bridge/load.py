"""A MODEL from a file or folder, as ComfyUI's own loader makes it, with its shift set as ModelSamplingSD3 sets it."""
from __future__ import annotations

import logging
import math
import mmap
import os
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from safetensors import SafetensorError
from torch import Tensor

from ...wanlite_model.compress.handle import StudentHandle
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.files import read_json
from ...wanlite_model.formats import quantised
from ...wanlite_model.formats.container import DTYPES, read_header
from ...wanlite_model.formats.quantised import Place
from ...wanlite_model.formats.read import WanFile, open_wan
from ...wanlite_model.teacher import Teacher, fingerprint_tensors
from . import folders

log = logging.getLogger(__name__)


def open_model(path: Path, shift: float | None = None, dtype: torch.dtype | None = None) -> Any:
    """The MODEL in a .safetensors file, or in a WAN or diffusers folder. shift: None leaves ComfyUI's default of 8.

    A single file goes to the stock loader, quantised or not; it is checked before with the config.json beside it, since ComfyUI fills what is
    missing with whatever memory holds, and never reads the other. Raises WanLiteError when it is not a whole WAN.
    """
    options = {} if dtype is None else {"dtype": dtype}
    file = _stock_file(path)
    if file is not None:
        _check(path)
    try:
        if file is not None and _is_read_by_this_core(file):
            model = comfy.sd.load_diffusion_model(str(file), model_options=options)
        else:
            model = _put_together(path, options)
    except WanLiteError:
        raise
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, AssertionError, ArithmeticError, SafetensorError) as error:
        log.warning("ComfyUI's loader on %s: %s", path.name, error)
        raise WanLiteError(f"ComfyUI cannot open {path.name} as a model.", "", "Choose a WAN file from models/diffusion_models.") from error
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


def file_of(teacher: Teacher) -> Path | None:
    """The model file that holds this teacher's weights as they are: unpatched, in the same dtype. Only those of its architecture are read, and
    no quantised ones: a MODEL is known by what it stores, and they are handed out unpacked.
    """
    for path in filter(None, map(folders.model_path, folders.model_names())):
        try:
            with open_wan(path) as source:
                if not source.packed and source.config == teacher.config and fingerprint_tensors(source.tensors()) == teacher.fingerprint:
                    return path
        except WanLiteError:
            continue            # no WAN, or none that this reader can unpack
    return None


def _put_together(path: Path, options: dict[str, Any], **newer: Any) -> Any:
    """A MODEL of shards or of diffusers names. newer: what newer ComfyUIs ask for when one of their nodes loads it from disk a second time."""
    with open_wan(path) as source:
        tensors, header = _mapped(source)
        model = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options, metadata=header, **newer)
    model.cached_patcher_init = (_put_together, (path, options))      # where they look for the way to do so; older ones never look
    return model


def _mapped(source: WanFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors as ComfyUI's own loader has them, mapped: ComfyUI copies them into its model, and memory would hold both. And the metadata
    that goes with them: layers with a scale are marked in the header, the one encoding that ComfyUI reads from 0.3.75 on.
    """
    maps = {path: mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) for path, file in source.files.items()}

    def at(place: Place) -> Tensor:
        return torch.frombuffer(maps[place.path], dtype=DTYPES[place.entry.dtype], count=math.prod(place.shape),
                                offset=place.entry.start).reshape(place.shape)

    scaled = {name.removesuffix(".weight"): place for name, place in source.places.items() if place.scale is not None}
    tensors = {name: at(place) for name, place in source.places.items()}
    tensors |= {f"{layer}.weight_scale": at(place.scale) for layer, place in scaled.items()}
    formats = {layer: quantised.NAMES[place.entry.dtype] for layer, place in scaled.items()}
    return tensors, quantised.header_of(formats) if formats else {}


def _check(path: Path) -> None:
    """Raises WanLiteError on a broken container, and on a WAN that is not whole or not what its config.json says."""
    try:
        with open_wan(path):
            pass
    except quantised.UnknownFormat as error:
        log.info("ComfyUI's loader will know better: %s", error)


def _is_read_by_this_core(file: Path) -> bool:
    """Older ComfyUIs pass over the marks of layers (comfy_quant), and compute with what is stored as if it were the weights."""
    return hasattr(comfy.utils, "detect_layer_quantization") or not any(name.endswith(quantised.OF_LAYER) for name in read_header(file).entries)


def _stock_file(path: Path) -> Path | None:
    """What the stock loader can take: the file itself, or the one file of a folder in WAN's own names."""
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        return None
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 and _is_wans(path / "config.json") else None


def _is_wans(config: Path) -> bool:
    """Whether it says so; one that cannot be read does not, and open_wan tells the user."""
    try:
        return read_json(config)["_class_name"] == "WanModel"
    except (OSError, ValueError, KeyError, TypeError):
        return False
