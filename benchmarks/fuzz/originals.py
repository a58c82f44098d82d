"""The whole and honest things that are spoiled: tiny, random, one of each kind that WanLite reads. And a place where a copy of one is spoiled."""
from __future__ import annotations

import json
import os
import pickle  # nosec B403  # writes one that harms, which no reader may open
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanlite_model.compress.build import create_student
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.cond import Shown
from wanlite_model.config import WanConfig
from wanlite_model.distill import inputs
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.checks import lora_fingerprint
from wanlite_model.distill.data import latents_fingerprint
from wanlite_model.distill.inputs import Inputs
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.experts import Role
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.keymap import key_map
from wanlite_model.formats.lora import Factors, Lora, write_lora
from wanlite_model.prompts import PromptBank
from wanlite_model.teacher import FileTeacher
from wanlite_model.transformer import WanLiteStudent

CONFIG = WanConfig(dim=128, ffn_dim=128, num_layers=2)
SHAPE = (16, 1, 4, 4)
# What is opened of each kind, below its folder. The weights of all WANs are the same.
ENTRY = {"file": "wan.safetensors", "student": "student", "shards": "shards", "diffusers": "transformer", "marked": "marked.safetensors",
         "scaled": "scaled.safetensors", "gguf": "wan.gguf", "lora": "lora.safetensors",
         "bank": "bank.safetensors",
         "config": "config.json", "job": "job.json", "note": "note.json", "run": "run", "start": "starts"}
WANS = ("file", "student", "shards", "diffusers")
PACKED = ("marked", "scaled")                   # in float8, with the newer and with the older marks of that
GGUF = "gguf"
DICTS = ("config", "job", "note")               # that are given as values, not as files
INDEX = "model.safetensors.index.json"
OUTSIDE = "outside"                             # beside the place: what nothing in it may lead to


@dataclass
class Place:
    """A folder with a copy of an original, which a mutation changes. path: what is opened. same: whether that must still give what the original does."""
    home: Path
    folder: Path
    kind: str
    path: Path
    same: bool = False

    @property
    def outside(self) -> Path:
        return self.home / OUTSIDE

    def files(self, end: str) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*" + end) if path.is_file())


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, goal: Path) -> None:
        self.goal = goal

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.goal), 0o777, True)


def harmful(home: Path) -> bytes:
    return pickle.dumps({"weight": Harmful(home / OUTSIDE / "unpickled")})


def copied(home: Path, kind: str) -> Place:
    """A fresh place with what `made` put into `home`."""
    folder = home / "place"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home / "originals" / kind, folder)
    return Place(home=home, folder=folder, kind=kind, path=folder / ENTRY[kind])


def made(home: Path) -> None:
    """Writes all originals below `home`, and what lies outside of every place."""
    wan = _weights()
    folders = {kind: home / "originals" / kind for kind in ENTRY}
    for folder in folders.values():
        folder.mkdir(parents=True)
    _wans(folders, wan)
    _packed(folders, {name: value.float() for name, value in wan.state_dict().items()})
    bank = PromptBank(prompts=("a cat", "a dog"), contexts=tuple(torch.randn(3, 4096) for _ in range(2)), negative_text="no", negative=torch.randn(2, 4096),
                      shown=tuple(Shown(image=torch.randn(20, 1, 4, 4), clip_fea=torch.randn(2, 1280), given=torch.randn(16, 1, 4, 4)) for _ in range(2)))
    bank.save(folders["bank"] / ENTRY["bank"])
    lora = Lora(factors={layer: Factors(down=torch.randn(4, 128), up=torch.randn(128, 4), scale=0.5) for layer in ("blocks.0.ffn.2", "blocks.1.cross_attn.q")},
                diffs={"blocks.0.norm3.weight": torch.randn(128), "blocks.1.ffn.0.bias": torch.randn(128)})
    write_lora(folders["lora"] / ENTRY["lora"], lora)
    teacher = FileTeacher(folders["file"] / ENTRY["file"], shift=3.0, device=torch.device("cpu"))
    for _ in create_student(teacher, bank, SHAPE, depth=1, method="interleaved", folder=folders["start"] / ENTRY["start"]):
        pass
    handle = StudentHandle.of(folders["student"] / ENTRY["student"])
    parts = Inputs(student=handle, prompts=bank, latents=torch.randn(2, *SHAPE), start_from=lora)
    job = _job(teacher, parts)
    for _ in inputs.prepare(RunFolder(folders["run"] / ENTRY["run"]), job, parts, teacher, home / "cache"):
        pass
    RunFolder(folders["run"] / ENTRY["run"]).log(kind="step", step=1, loss=0.5)
    _write(folders["config"] / ENTRY["config"], CONFIG.to_json())
    _write(folders["job"] / ENTRY["job"], replace(job, sigmas=(1.0, 0.5, 0.0), role=Role(side="high", boundary=0.875), other="0" * 16).to_json())
    _write(folders["note"] / ENTRY["note"], replace(handle, loras=("a.safetensors",)).to_json())
    _outside(home, folders["file"] / ENTRY["file"])


def _weights() -> WanLiteStudent:
    torch.manual_seed(0)
    wan = WanLiteStudent.from_wan(CONFIG, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in wan.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    wan.card = StudentCard(steps=8, cfg=1.0, shift=3.0, teacher="WAN", teacher_fingerprint="0123456789abcdef", keep=(0, 2), ffn_dim=128,
                           recipe={"teacher_layers": 4, "teacher_ffn_dim": 256}, measured={"error": 0.01})
    return wan


def _wans(folders: dict[str, Path], wan: WanLiteStudent) -> None:
    wan.save_pretrained(folders["file"] / ENTRY["file"], layout="single file")
    wan.save_pretrained(folders["student"] / ENTRY["student"])
    for kind, config, names in (("shards", CONFIG.to_wan(), {}), ("diffusers", CONFIG.to_diffusers(), key_map("wan", "diffusers", CONFIG.num_layers))):
        folder = folders[kind] / ENTRY[kind]
        folder.mkdir()
        tensors = {names.get(name, name): value.contiguous() for name, value in wan.state_dict().items()}
        where = {name: f"model-{1 + number % 2}.safetensors" for number, name in enumerate(tensors)}
        for file in set(where.values()):
            save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file, {"format": "pt"})
        _write(folder / "config.json", config)
        _write(folder / INDEX, {"metadata": {}, "weight_map": where})


def _packed(folders: dict[str, Path], weights: dict[str, Tensor]) -> None:
    """The matrices of the blocks in float8 with a scale each, told in the header (of block 0) and by layer, or the older way; and in Q8_0."""
    chosen = {name.removesuffix(".weight"): value for name,
              value in weights.items() if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2}
    scales = {layer: value.abs().max() / 448 for layer, value in chosen.items()}
    small = {f"{layer}.weight": (value / scales[layer]).to(torch.float8_e4m3fn) for layer, value in chosen.items()}
    rest = {name: value.bfloat16() for name, value in weights.items() if name not in small}
    note = {"format": "float8_e4m3fn"}
    told = {layer: note for layer in chosen if layer.startswith("blocks.0.")}
    marks = {f"{layer}.comfy_quant": torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8) for layer in chosen.keys() - told.keys()}
    save_file({**rest, **small, **marks, **{f"{layer}.weight_scale": scale for layer, scale in scales.items()}}, folders["marked"] / ENTRY["marked"],
              {"format": "pt", "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": told})})
    save_file({**rest, **small, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), **{f"{layer}.scale_weight": scale for layer, scale in scales.items()}},
              folders["scaled"] / ENTRY["scaled"], {"format": "pt"})
    writer = gguf.GGUFWriter(folders["gguf"] / ENTRY["gguf"], "wan")
    for name, value in weights.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name in small else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _job(teacher: FileTeacher, parts: Inputs) -> DistillJob:
    return DistillJob(student=parts.student.fingerprint, teacher=teacher.fingerprint, prompts=parts.prompts.fitted(teacher.config, SHAPE).fingerprint,
                      latents=latents_fingerprint(parts.latents), start_from=lora_fingerprint(parts.start_from), shape=SHAPE, shift=3.0, steps=4,
                      recipe=Recipe(teacher_steps=2))


def _outside(home: Path, weights: Path) -> None:
    """Files that would open well."""
    folder = home / OUTSIDE
    folder.mkdir()
    shutil.copy(weights, folder / "wan.safetensors")
    for number in (1, 2):
        shutil.copy(home / "originals" / "shards" / ENTRY["shards"] / f"model-{number}.safetensors", folder)
    _write(folder / "config.json", CONFIG.to_json())
    (folder / "wan.bin").write_bytes(harmful(home))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
