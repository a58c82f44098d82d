"""Trains and measures one row, in a process of its own."""
from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import torch

from demo import timing
from demo.world import World
from wanlite_model.config import WanConfig
from wanlite_model.compress.apply import plain_cut
from wanlite_model.compress.build import create_student
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.checks import lora_fingerprint
from wanlite_model.distill.events import Finished
from wanlite_model.distill.finish import finished_from_disk
from wanlite_model.distill.job import DistillJob
from wanlite_model.distill.trainer import run
from wanlite_model.files import read_json, write_json
from wanlite_model.formats.lora import read_lora
from wanlite_model.formats.write import MODEL_FILE, write_student
from wanlite_model.teacher import ModuleTeacher
from wanlite_model.transformer import WanLiteStudent

from .. import result_of
from ..teachers import WORLDS
from ..teachers import train as train_teacher
from .rows import Row
from .score import Reference, clip_scores, drawn, make_part, open_vae, parts, velocity_scores
from .task import Task


def prepare(tasks: Sequence[Task], device: str, pool: Executor) -> None:
    """Sees to it that each world's teacher is there, and what the rows are compared with."""
    for world in {task.world for task in tasks}:
        train_teacher(WORLDS[world])
    missing = [pool.submit(refer, task, part, device) for task in {(task.world, task.row.frames): task for task in sorted(tasks, key=lambda task: task.videos)}.values()
               for part in parts(world_of(task), task.videos) if not (reference_folder(task) / part).exists()]
    for done in missing:
        done.result()


def refer(task: Task, part: str, device: str) -> None:
    """Makes a part of what the task's rows are compared with."""
    alone(device)
    world = world_of(task)
    make_part(teacher_of(world, device), open_vae(), world, reference_folder(task), part)


def alone(device: str) -> None:
    """One thread: the other cores have work of their own."""
    if device == "cpu":
        torch.set_num_threads(1)


def teacher_of(world: World, device: str) -> WanLiteStudent:
    return WanLiteStudent.from_pretrained(world.teacher, torch_dtype=torch.float32, device=device)


def reference_folder(task: Task) -> Path:
    """Named by the teacher too: another one is another reference."""
    return task.shared / f"reference-{world_of(task).latents[1]}-{task.teacher}"


def settle(task: Task, device: str) -> dict:
    """Trains what is to be trained, measures it, and keeps the scores in the task's folder."""
    alone(device)
    world, row = world_of(task), task.row
    module, vae, reference = teacher_of(world, device), open_vae(), Reference.of(world, task.videos, reference_folder(task))
    student, trained = module, {"iterations": 0, "train seconds": 0.0}
    if row.recipe is not None:
        end, starting = train(task, world, ModuleTeacher(module, shift=world.shift), device)
        student = end.handle.load(torch.float32, device)
        stepping = sum(step["seconds"] for step in RunFolder(task.folder / "run").rows("step"))
        trained = {"iterations": len(end.losses), "train seconds": stepping, "start seconds": starting}
    elif row.method == "plain":
        student = plain(module, row)
    elif row.share < 1 or row.ffn < 1 or row.lora_of:
        start, starting = started(task, world, ModuleTeacher(module, shift=world.shift), world.cfg)
        student, trained["start seconds"] = start.load(torch.float32, device), starting
    cfg = cfg_of(task)
    clips = (reference.clips, reference.varied) if row.kind == "teacher" else drawn(student, reference, vae, row.steps, cfg)
    scores = {**velocity_scores(None if student is module else student, reference, cfg), **clip_scores(reference, *clips), **trained, "parameters": student.num_parameters(), "evaluations": row.steps * (1 if cfg == 1 else 2)}
    write_student(task.folder / "student", config=student.wan, tensors=student.state_dict().items(), dtype=torch.bfloat16, overwrite=True)
    write_json(task.folder / "scores.json", {"key": task.key, "scores": scores})
    return scores


def world_of(task: Task) -> World:
    world = WORLDS[task.world]
    channels, frames, *size = world.latents
    return replace(world, latents=(channels, task.row.frames or frames, *size))


def resized(config: WanConfig, row: Row) -> WanConfig:
    return config.resized(num_layers=round(config.num_layers * row.share), ffn_dim=round(config.ffn_dim * row.ffn))


def plain(teacher: WanLiteStudent, row: Row) -> WanLiteStudent:
    """The plain cut, untrained."""
    config = resized(teacher.wan, row)
    student = WanLiteStudent.from_wan(config)
    student.load_state_dict(dict(plain_cut(ModuleTeacher(teacher, shift=1.0), config)))
    return student.to(next(teacher.parameters()).device).eval()


def train(task: Task, world: World, teacher: ModuleTeacher, device: str) -> tuple[Finished, float]:
    """The row's student, from disk when an earlier call came to its end, and the seconds of making its start."""
    row, bank = task.row, world.bank()
    cfg = world.cfg
    if row.of:
        module = handle_of(task, row.of).load(torch.float32, device)
        teacher, cfg = ModuleTeacher(module, shift=world.shift), 1.0
    start, seconds = started(replace(task, row=replace(row, lora_of="")), world, teacher, cfg)
    lora = read_lora(lora_of(task), start.config) if row.lora_of else None
    job = DistillJob(student=start.fingerprint, teacher=teacher.fingerprint, prompts=bank.fingerprint, shape=world.latents, shift=world.shift,
                     cfg=cfg, fold_guidance=row.cfg is not None, steps=row.training, train_seed=task.seed, recipe=row.recipe, start_from="" if lora is None else lora_fingerprint(lora))
    forget_another(job, task.folder / "run")
    *_, end = run(job, task.folder / "run", task.shared / "cache", teacher, start, bank, start_from=lora)
    return end, seconds


def forget_another(job: DistillJob, folder: Path) -> None:
    """Takes a run away that trained something else when the row meant something else."""
    noted = RunFolder(folder).noted("job")
    if noted is not None and noted != json.loads(json.dumps(job.to_json())):
        shutil.rmtree(folder)


def started(task: Task, world: World, teacher: ModuleTeacher, cfg: float) -> tuple[StudentHandle, float]:
    """What the row begins with, and the seconds that making it took."""
    row = task.row
    if row.after or row.scratch:
        return handle_of(task, row.after) if row.after else fresh(task, world), 0.0
    start, seconds = created(task, world, teacher, cfg)
    return replace(start, loras=(str(lora_of(task)),)) if row.lora_of else start, seconds


def lora_of(task: Task) -> Path:
    """The LoRA that the row's source ended with."""
    return Path(finished_from_disk(RunFolder(task.source / "run")).handle.loras[-1])


def handle_of(task: Task, name: str) -> StudentHandle:
    return finished_from_disk(RunFolder(task.folder_of(name) / "run")).handle


def created(task: Task, world: World, teacher: ModuleTeacher, cfg: float) -> tuple[StudentHandle, float]:
    """The start, and the seconds that making it took when it was made."""
    row, starts, begun = task.row, task.shared / "starts", time.monotonic()
    size = resized(teacher.config, row)
    making = create_student(teacher, world.bank(), world.latents, depth=size.num_layers, ffn_dim=size.ffn_dim, method=row.method,
                            refit=row.refit, block_steps=row.block_steps, seed=task.seed, cfg=cfg, folder=starts)
    handle, _ = result_of(making)
    noted = starts / f"{handle.fingerprint}.json"
    if not noted.exists():
        write_json(noted, time.monotonic() - begun)
    return handle, read_json(noted)


def fresh(task: Task, world: World) -> StudentHandle:
    """Random weights of the row's size."""
    torch.manual_seed(task.seed)
    config = resized(world.config, task.row)
    place = task.folder / f"scratch-{config.num_layers}-{config.ffn_dim}"
    if not place.exists():
        WanLiteStudent.from_wan(config).save_pretrained(place)
    return StudentHandle.of(place)


def timed(tasks: Sequence[Task]) -> dict[Task, float]:
    """Seconds of a video of each row."""
    return timing.timed({task: timing.Sampled(file=task.folder / "student" / MODEL_FILE, world=world_of(task), steps=task.row.steps, cfg=cfg_of(task))
                         for task in tasks})


def cfg_of(task: Task) -> float:
    return WORLDS[task.world].cfg if task.row.cfg is None else task.row.cfg
