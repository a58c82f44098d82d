"""LoRAs that were made for a student's teacher, moved to the student's blocks.

A LoRA names blocks by number, so one for 30 blocks fits a student of 20 without complaint and changes the wrong ones. Here each change
goes, by the keep-map, where its block went; what belonged to a block that is gone is dropped and counted. In narrowed FFNs the kept
neurons' rows and columns are taken. Moving is renaming, exact for every kind of change; narrowing is exact for the kinds that can be cut.
"""
from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WanLiteError
from ..formats import lora_parts
from ..formats.card import StudentCard, header, read_metadata
from ..formats.container import DTYPES, Entry, Writer, read_header, read_tensor
from ..formats.keymap import wan_shapes
from ..formats.lora_keys import TEXT_ENCODERS, layers_named, spellings, split, stock_key
from ..formats.neurons import from_mask
from ..formats.place import check_name, put_in_place, sentence_for, temporary_place
from ..formats.saving import check_free
from .handle import StudentHandle
from .plan import CompressionPlan, Progress, format_keep_map

REMAPPED = "remapped"           # the key, after `wanlite.`, that says for which student a file was made
CHOOSE = "Choose a LoRA that was made for this student's teacher."
STOCK = "Load it on that student with ComfyUI's own LoRA loader, or choose the LoRA that was made for the teacher."
FFN = {".ffn.0": "rows", ".ffn.2": "columns"}       # what of the layer's weight belongs to the neurons


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherLora:
    """A LoRA file, checked by its header. parts: {the teacher's layer: {part of its change: key}}.

    modulation, text, absent: how many of its keys change modulation (which ComfyUI never applies), a text encoder, and layers of other
    kinds of WAN: these say nothing to the teacher either.
    """
    path: Path
    entries: Mapping[str, Entry]
    parts: Mapping[str, Mapping[str, str]]
    modulation: int = 0
    text: int = 0
    absent: int = 0

    def change(self, layer: str) -> dict[str, Tensor]:
        """{part: tensor} of one of the teacher's layers, as stored; eight bits become sixteen, which hold the same numbers."""
        found = {}
        with self.path.open("rb") as file, torch.inference_mode(False):
            for part, key in self.parts[layer].items():
                tensor = read_tensor(file, self.entries[key])
                found[part] = tensor.bfloat16() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Survived:
    """What of a LoRA the student has: `kept` of `layers` layers, and the share of the sum of its squares, None where that depends on the
    weights under it. gone: the teacher's blocks that it changes and the student lacks. narrowed: layers of which the kept neurons' part was
    taken. uncut: {kind: FFN layers it could not be taken of}.
    """
    layers: int
    kept: int
    strength: float | None
    gone: tuple[int, ...]
    narrowed: int
    uncut: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What ComfyUI made of a new file: how many of its tensors it took, of how many layers the weights were compared. why: it could not be asked."""
    tensors: int = 0
    compared: int = 0
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"Not verified: {self.why}."
        where = f"compared in {self.compared} layer{'s' * (self.compared > 1)}"
        weights = f", and the student's weights became what was meant ({where})" if self.compared else ""
        return f"Verified: ComfyUI's LoRA loader took all of its {self.tensors} tensors{weights}."


def save_remapped(loras: Mapping[str, TeacherLora], student: StudentHandle, home: Path, *, verify: Callable[[Path, TeacherLora], Taken],
                  overwrite: bool) -> Generator[Progress, None, str]:
    """Writes each LoRA to home/<name>, all of them or none; returns a paragraph on each.

    verify: opens a new file before any is put in place; what it raises ends it all. Raises WanLiteError, and then nothing on disk has changed.
    """
    home, report = Path(home).absolute(), []
    for name in loras:
        check_name((home / name).name, "a LoRA")
        check_free(home / name, None, overwrite)
    try:
        with temporary_place(home / "any") as place:
            moves = []
            for i, (name, lora) in enumerate(loras.items()):
                yield Progress(stage="Moving LoRAs", done=i, total=len(loras))
                new = place / f"{i}.safetensors"
                survived = write_remapped(new, lora, student)
                report.append(f"{name}: {describe(lora, survived, student.plan)} {verify(new, lora)}")
                moves.append((new, home / name))
            put_in_place(moves, home / name)
    except OSError as error:
        raise sentence_for(error, name) from error
    return "\n".join(report)


def check_student(student: StudentHandle) -> None:
    """Raises WanLiteError unless LoRAs for this student's teacher need, and can get, another form."""
    plan = student.plan
    if plan.prunes_nothing:
        raise WanLiteError("This student has all blocks and FFN neurons of its teacher.", "LoRAs that fit the teacher fit it as they are.",
                           "Load them with ComfyUI's own LoRA loader.")
    if plan.ffn_dim < plan.teacher_ffn_dim and not plan.ffn_kept:
        raise WanLiteError(f"This student has {plan.ffn_dim} of its teacher's {plan.teacher_ffn_dim} FFN neurons, and its file does not say which.",
                           "A LoRA's change of the FFN has to follow them.", "Create the student again: what is written now says it.")


def read_teacher_lora(path: Path, student: StudentHandle) -> TeacherLora:
    """The LoRA in a file, for the teacher of this student. Raises WanLiteError on any other, and on one that is made for a student."""
    header = read_header(path)
    _check_origin(path, read_metadata(header.metadata), student)
    teacher = student.config.resized(num_layers=student.plan.teacher_layers, ffn_dim=student.plan.teacher_ffn_dim)
    shapes, ours = wan_shapes(teacher), wan_shapes(student.config)
    names = spellings(max(teacher.num_layers, layers_named(header.entries)))
    parts: dict[str, dict[str, str]] = {}
    counted: Counter[str] = Counter()
    strange, beyond = [], set()
    for key in header.entries:
        layer, part = split(key, names)
        block = re.match(r"blocks\.(\d+)\.", layer or "")
        if layer is None:
            counted["text"] += key.startswith(TEXT_ENCODERS)
            strange += [] if key.startswith(TEXT_ENCODERS) else [key]
        elif block and int(block[1]) >= teacher.num_layers:
            beyond.add(int(block[1]))
        elif layer.endswith("modulation"):
            counted["modulation"] += 1
        elif f"{layer}.weight" not in shapes:
            counted["absent"] += 1
        elif parts.setdefault(layer, {}).setdefault(part, key) != key:
            raise WanLiteError(f"{path.name} holds the {part} of {layer} twice: {parts[layer][part]} and {key}.", "", CHOOSE)
    if strange or not (parts or beyond):
        raise _no_lora(path, strange, counted)
    if beyond:
        raise WanLiteError(f"{path.name} changes block {max(beyond)}.",
                           f"The teacher of this student has blocks 0-{teacher.num_layers - 1}: the LoRA was made for a deeper WAN.", CHOOSE)
    for layer, found in parts.items():
        _check_layer(path, layer, {part: header.entries[key] for part, key in found.items()}, shapes, ours)
    return TeacherLora(path=path, entries=header.entries, parts=parts, **counted)


def place_of(layer: str, plan: CompressionPlan) -> str | None:
    """The student's name of a teacher's layer; None when its block is gone."""
    match = re.fullmatch(r"blocks\.(\d+)(\..+)", layer)
    if match is None:
        return layer
    return f"blocks.{plan.keep.index(int(match[1]))}{match[2]}" if int(match[1]) in plan.keep else None


def moved(change: lora_parts.Change, layer: str, plan: CompressionPlan) -> dict[str, Tensor]:
    """What the student takes of a change of the teacher's layer, whose block it has; empty where its neurons cannot be cut out of it."""
    axis = FFN.get(re.sub(r"^blocks\.\d+", "", layer))
    if axis is None or plan.ffn_dim == plan.teacher_ffn_dim:
        return dict(change)
    kept = from_mask(plan.ffn_kept[plan.keep.index(int(layer.split(".")[1]))])
    return lora_parts.cut(change, **{axis: torch.tensor(kept)})


def write_remapped(file: Path, lora: TeacherLora, student: StudentHandle) -> Survived:
    """Writes what the student takes of it, under the keys that ComfyUI's loader takes. Raises WanLiteError when that is nothing.

    Of what the file said of itself nothing is passed on: trainers note paths and prompts there.
    """
    plan, tensors = student.plan, {}
    before, after = [], []                      # energies, layer by layer
    gone, narrowed, kept, uncut = set(), 0, 0, Counter()
    for layer in lora.parts:
        change, place = lora.change(layer), place_of(layer, plan)
        before.append(lora_parts.energy(change))
        if place is None:
            gone.add(int(layer.split(".")[1]))
            continue
        taken = moved(change, layer, plan)
        if change.keys() - taken.keys() - lora_parts.BESIDE:
            uncut[str(lora_parts.kind(change))] += 1
        if taken:
            after.append(lora_parts.energy(taken))
            kept += 1
            narrowed += any(taken[part].shape != change[part].shape for part in taken)
            tensors |= {stock_key(place, part): tensor for part, tensor in taken.items()}
    if not kept:
        raise WanLiteError(f"Of {lora.path.name} nothing is left in this student.", f"It changes {_blocks(gone) or 'FFN layers'} of the teacher only, "
                           "which the student does not have." if gone else "None of its changes can be narrowed to the kept FFN neurons.", CHOOSE)
    note = {"student": student.fingerprint, "keep": list(plan.keep), "teacher_layers": plan.teacher_layers, "ffn_dim": plan.ffn_dim,
            "teacher_ffn_dim": plan.teacher_ffn_dim}
    with Writer(file, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {"format": "pt", **header({REMAPPED: note})}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    strength = None if None in before else sum(after) / (sum(before) or 1.0)
    return Survived(layers=len(lora.parts), kept=kept, strength=strength, gone=tuple(sorted(gone)), narrowed=narrowed, uncut=dict(uncut))


def describe(lora: TeacherLora, survived: Survived, plan: CompressionPlan) -> str:
    """What became of it, in a few sentences."""
    strength = "" if survived.strength is None else f", {survived.strength:.0%} of its strength"
    told = [f"{survived.kept} of {survived.layers} layers of {lora.path.name}{strength}; gone: {_blocks(survived.gone) or 'nothing'}."]
    if survived.strength is None:
        told.append("How much it changes depends on the weights under it, so the share of its strength was not measured.")
    if survived.narrowed:
        told.append(f"Of {survived.narrowed} FFN changes the part of the {plan.ffn_dim} kept neurons was taken; the LoRA does not know what was refitted "
                    "behind them.")
    for kind, count in survived.uncut.items():
        told.append(f"{count} {kind} change{'s' * (count > 1)} of the FFN could not be narrowed and {'were' if count > 1 else 'was'} left out.")
    for count, what in ((lora.modulation, "modulation, which ComfyUI never applies"), (lora.text, "a text encoder, which is none of the student's"),
                        (lora.absent, "layers of other kinds of WAN, which the teacher does not have")):
        if count:
            told.append(f"Left out: {count} of its tensors that change {what}.")
    named = layers_named(lora.parts)
    if named == len(plan.keep) < plan.teacher_layers:
        told.append(f"It changes blocks 0-{named - 1}, as many as the student has: had it been trained on the student itself, it would have to be used "
                    "as it was.")
    return " ".join(told)


def _blocks(blocks: tuple[int, ...] | set[int]) -> str:
    """"blocks 5,9-11"."""
    return f"block{'s' * (len(blocks) > 1)} {format_keep_map(tuple(sorted(blocks)))}" if blocks else ""


def _check_origin(path: Path, noted: Mapping[str, object], student: StudentHandle) -> None:
    """Raises WanLiteError on a file that says it was made for a student, unless that is what this student was cut from."""
    plan, card = student.plan, student.card
    if REMAPPED in noted:
        made_for = noted[REMAPPED].get("student") if isinstance(noted[REMAPPED], dict) else None
        if made_for != (card.teacher_fingerprint if card else ""):
            raise WanLiteError(f"{path.name} was moved to a student's blocks already.", "It would be moved a second time.", STOCK)
    made_by = StudentCard.from_json(noted)
    if made_by and made_by.keep and (made_by.keep != tuple(range(plan.teacher_layers)) or made_by.ffn_dim != plan.teacher_ffn_dim):
        raise WanLiteError(f"{path.name} was trained by WanLite on a WAN of {len(made_by.keep)} blocks and FFN {made_by.ffn_dim}.",
                           f"The teacher of this student has {plan.teacher_layers} blocks and FFN {plan.teacher_ffn_dim}.", STOCK)


def _check_layer(path: Path, layer: str, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]) -> None:
    """Raises WanLiteError unless the parts make a whole change of this layer of the teacher. ours: the student's shapes."""
    rare = next((entry.dtype for entry in entries.values() if entry.dtype not in DTYPES), None)
    if rare is not None:
        raise WanLiteError(f"{path.name} holds {layer} in {rare!r}.", "LoRAs are read in float32, float16, bfloat16 and float8.", CHOOSE)
    found = {part: entry.shape for part, entry in entries.items()}
    if any(0 in shape for shape in found.values()) or math.prod(found.get("alpha", ())) != 1:
        raise WanLiteError(f"{path.name} has an empty change of {layer}, or one whose alpha is no number.", "", "Download or copy the file again.")
    if lora_parts.kind(found) is None:
        raise WanLiteError(f"{path.name} has only a part of its change of {layer}: {', '.join(sorted(found))}.", "", "Download or copy the file again.")
    if (wrong := _misfit(found, shapes, layer)) is None:
        return
    already = _misfit(found, ours, re.sub(r"^blocks\.\d+", "blocks.0", layer)) is None
    expected = f"The teacher of this student has {list(shapes[f'{layer}.weight'])} there"
    raise WanLiteError(f"{path.name} changes {layer} by {list(wrong) or 'parts that do not fit each other'}.",
                       f"{expected}; the student itself has what it was made for." if already else f"{expected}.", STOCK if already else CHOOSE)


def _misfit(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], layer: str) -> tuple[int, ...] | None:
    """The first shape that is not the layer's, () when parts do not fit each other, None when all is well. found: {part: shape}."""
    weight, bias = shapes[f"{layer}.weight"], shapes.get(f"{layer}.bias")
    for part, expected in {"diff": weight, "set_weight": weight, "diff_b": bias}.items():
        if part in found and found[part] != expected:
            return found[part]
    made_for, flat = lora_parts.shape(found), lora_parts.matrix(weight)
    if made_for is None:
        return ()
    return None if all(given in (0, is_) for given, is_ in zip(made_for, flat)) else made_for


def _no_lora(path: Path, strange: list[str], counted: Mapping[str, int]) -> WanLiteError:
    told = (f"It changes {strange[0]!r} and {len(strange) - 1} more, which no WAN that WanLite knows has." if strange else
            "It changes a text encoder only, which a student does not have: use it as it is." if counted["text"] else
            "It changes modulation only, which ComfyUI never applies." if counted["modulation"] else
            "It changes layers of other kinds of WAN only." if counted["absent"] else "It changes nothing.")
    return WanLiteError(f"{path.name} is no LoRA for the teacher of this student.", told, CHOOSE)
