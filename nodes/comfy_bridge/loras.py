"""LoRAs for a student's teacher, moved to the student; each is opened by ComfyUI's own LoRA loader before any of them is put in place."""
from __future__ import annotations

import gc
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...wanlite_model.compress.handle import Opened, StudentHandle
from ...wanlite_model.compress.loras import Taken, TeacherLora, check_student, moved, place_of, read_teacher_lora, save_remapped
from ...wanlite_model.compress.plan import Progress
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.formats.keymap import wan_size
from ...wanlite_model.formats.lora_parts import delta
from ...wanlite_model.formats.saving import check_free
from . import folders, memory
from .disk import check_present
from .load import open_student
from .teacher import PREFIX
from .verify import LORA_READER, OPENED

LIMIT = 1e-4            # of the largest change of a weight; fp32 is not summed in the same order everywhere
ROUNDING = 2e-7         # of the largest weight: fp32's own

_saved: set[Path] = set()       # by this process, as in save.py


def remap(student: StudentHandle, chosen: Mapping[str, bool], *, suffix: str, overwrite: bool) -> Generator[Progress, None, tuple[list[str], str]]:
    """Writes them below models/loras, all or none; returns their new names and a report.

    chosen: {name: whether only a wildcard found it}. What only a wildcard found is left out, with its reason, where it is for another model.
    Raises WanLiteError, and then nothing on disk has changed.
    """
    check_present(student)
    check_student(student)
    loras: dict[str, TeacherLora] = {}
    left_out: list[str] = []
    for name, by_wildcard in chosen.items():
        try:
            lora = read_teacher_lora(folders.lora_path(name), student)
        except WanLiteError as error:
            if not by_wildcard:
                raise
            left_out.append(f"Left out: {error}")
            continue
        new = _renamed(name, suffix)
        if new.lower() in map(str.lower, loras):
            raise WanLiteError(f"{name} and another LoRA would both become {new}.", "", "Choose one of them, or rename it.")
        loras[new] = lora
    home = folders.loras_folder()
    for new in loras:
        check_free(home / new, None, overwrite)         # before the student is opened
    report = yield from save_remapped(loras, student, home, verify=Verifier(student), overwrite=overwrite)
    _saved.update(home / new for new in loras)
    return list(loras), "\n".join((report, *left_out))


def check_targets(chosen: Mapping[str, bool], suffix: str, overwrite: bool) -> None:
    """Raises WanLiteError when a new name is taken, whatever the student is. A name that this process gave may be of the same LoRA, queued again."""
    for name, by_wildcard in chosen.items():
        target = folders.loras_folder() / _renamed(name, suffix)
        if not by_wildcard:                             # of what a pattern finds, some is for another model and left out
            check_free(target, None, overwrite or target in _saved)


def _renamed(name: str, suffix: str) -> str:
    return str(Path(name).with_name(f"{Path(name).stem}{suffix}.safetensors"))


class Verifier:
    """Whether ComfyUI's own loader lays all of a new file over the student, and whether the weights become what was meant.

    The student is opened once, for all files, when memory allows.
    """

    def __init__(self, student: StudentHandle) -> None:
        self._student = student
        self._why = memory.lacking(int(OPENED * student.dtype.itemsize * wan_size(student.config)))
        self._model = None if self._why else open_student(student)

    def __call__(self, file: Path, lora: TeacherLora) -> Taken:
        """Raises WanLiteError when it does not."""
        if self._model is None:
            return Taken(why=f"the student could not be opened, which {self._why.removeprefix('it ')}")
        tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
        patched = comfy.sd.load_lora_for_models(self._model, None, tensors, 1.0, 0.0)[0]
        used = {id(tensor) for patches in patched.patches.values() for patch in patches for tensor in _tensors(patch[1])}
        lost = [name for name, tensor in tensors.items() if id(tensor) not in used and not name.endswith(".alpha")]      # which is read as a number
        if lost:
            raise WanLiteError(f"{LORA_READER} passes over {lost[0]!r} and {len(lost) - 1} more of what was moved from {lora.path.name}.",
                               "It should take all of it.", "Nothing was saved; please report this with the LoRA's name.")
        compared = [layer for layer in lora.parts if place_of(layer, self._student.plan)]
        compared = [compared[i] for i in sorted({0, len(compared) // 2, len(compared) - 1})]        # weights are computed of these alone
        with self._student.open() as opened:
            taken = Taken(tensors=len(tensors), compared=sum(self._compare(layer, lora, patched, opened) for layer in compared))
        del tensors, patched, used
        gc.collect()                    # the file is renamed next, which Windows refuses while it is mapped
        return taken

    def _compare(self, layer: str, lora: TeacherLora, patched: Any, opened: Opened) -> bool:
        """Whether this layer of the teacher could be compared: what ComfyUI makes of the student's weight, with that weight and the change."""
        place = place_of(layer, self._student.plan)
        change = moved(lora.change(layer), layer, self._student.plan)
        meant = delta(change)
        if meant is None:
            return False
        key = f"{PREFIX}{place}.weight"
        stored, _, unpack = comfy.model_patcher.get_key_weight(patched.model, key)        # never loaded: nothing is laid over it in place
        plain = stored if unpack is None else unpack(stored, inplace=False)
        with torch.no_grad():
            became = comfy.lora.calculate_weight(patched.patches[key], plain.to(torch.float32, copy=True), key)
            [(_, weight)] = opened.tensors([f"{place}.weight"])
            difference = (became - weight.to(became.device).float() - meant.reshape(weight.shape).to(became.device)).abs().max()
        if not difference <= LIMIT * meant.abs().max() + ROUNDING * weight.abs().max():
            raise WanLiteError(f"{LORA_READER} makes something else of {place} than was moved there from {lora.path.name}.", "It should be the student's "
                               f"weight and the LoRA's change of {layer}.", "Nothing was saved; please report this with the LoRA's name.")
        return True


def _tensors(patch: Any) -> list[Tensor]:
    """Those that a patch of ComfyUI's holds: an adapter's, or a tuple's."""
    inner = getattr(patch, "weights", patch)
    if isinstance(inner, Tensor):
        return [inner]
    return [tensor for part in inner for tensor in _tensors(part)] if isinstance(inner, (list, tuple)) else []
