"""Expert settings of a distillation, for whoever wants them. What is left as it is stays the preset's."""
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import folders
from .sockets import Recipe
from .widgets import check_widgets

AS_PRESET = "as the preset"
START_FROM, BOUNDARY = "start_from", "boundary"         # the settings that are no fields of the engine's Recipe
UNSET = {"rank": -1, "own_states": -1.0, "renoised": -1.0, "full_range": -1.0, "ema_decay": -1.0, "weight_decay": -1.0, "warmup": -1, "swapped_blocks": -1}
AUTO, ON, OFF = "auto", "on", "off"
LEVERS = {
    "checkpointing": "Blocks are computed a second time in backward instead of being remembered: a third slower, for a fraction of the memory.",
    "checkpoints_on_cpu": "What blocks are computed again from waits in the computer's memory, not on the card.",
    "frozen_float8": "With adapters: the frozen weights are held in float8, half of bf16.",
    "optimizer_8bit": "Without adapters: AdamW with 8-bit moments on bf16 weights, in place of Muon too: a third of the memory.",
    "gradient_release": "With 8-bit AdamW: each weight moves as soon as its gradient is there, which is then freed."}
LIMITS = {          # in GiB: the most, the step, and what of
    "gpu_gib": (1024.0, 0.5, "GiB of the card's memory that the job is planned for: 12 for a 12 GB card, where a run is prepared for another machine. "
                             "0: what is free here."),
    "ram_gib": (8192.0, 0.5, "GiB of the computer's memory that the job is planned for. 0: what is free here."),
    "disk_gib": (100_000.0, 1.0, "GiB of disk that the job is planned for. 0: what is free here."),
    "cache_gib": (100_000.0, 1.0, "GiB that the teacher's recorded answers of all jobs may take; those used longest ago are removed first, none of this "
                                  "job's. 0: no limit."),
    "runs_gib": (100_000.0, 1.0, "GiB that all runs may take, with students not saved elsewhere; those worked on longest ago are removed first, none in use. "
                                 "0: no limit.")}


class WanLiteRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanLiteRecipe", display_name="WanLite Recipe", category="WanLite",
            description="Expert settings for WanLite Distill, in place of its preset's. What is left at 'as the preset', at 0, or at -1 where 0 means "
                        "something, stays the preset's.",
            inputs=[
                io.Combo.Input("objective", options=[AS_PRESET, "velocity", "velocity + features", "trajectory", "distribution"], default=AS_PRESET,
                               tooltip="What the student is to match: the teacher's answer; that and what its blocks hand on; its path in a few steps; or, "
                                       "to sharpen the LoRA of a few-step preset in 100 to 200 steps, what its clips look like (DMD2)."),
                io.Int.Input("rank", default=-1, min=-1, max=1024,
                             tooltip="Rank of the LoRA adapters that are trained: 16 to 128. 0: all weights, which takes several times the memory. -1: the "
                                     "preset's."),
                io.Combo.Input("start_from", options=[folders.NONE, *folders.lora_names()], default=folders.NONE,
                               tooltip="A LoRA that training begins with: a speed LoRA made for another WAN is healed to this one. For a student of the "
                                       "teacher's own size."),
                io.Int.Input("student_steps", default=0, min=0, max=100,
                             tooltip="Sampling steps that a few-step student is made for: 2 to 8. 0: the preset's. For 'trajectory' and 'distribution'; not "
                                     "used when SIGMAS are connected."),
                io.Float.Input("own_states", default=-1.0, min=-1.0, max=1.0, step=0.05,
                               tooltip="Share (0 to 1) of the training states that the student comes to by itself: 0.5 for few steps. With 'velocity' the "
                                       "teacher is then asked at every step, which takes time and memory. -1: the preset's."),
                io.Combo.Input("optimizer", options=[AS_PRESET, "AdamW", "Muon"], default=AS_PRESET,
                               tooltip="'Muon' can need fewer steps, and holds one number a weight less in memory. It is for the blocks' matrices; all else, "
                                       "and adapters, take AdamW."),
                io.Float.Input("learning_rate", default=0.0, min=0.0, max=0.1, step=1e-7,
                               tooltip="Peak of the learning rate: 2e-5 to 2e-4, the lower end for all weights, the upper for adapters. A cosine then lowers "
                                       "it to a tenth. 0: the preset's."),
                io.Int.Input("batch_size", default=0, min=0, max=256,
                             tooltip="Training states a step: 1 to 16. More is steadier and slower. 0: the preset's."),
                io.Int.Input("warmup", default=-1, min=-1, max=10_000,
                             tooltip="Steps until the peak learning rate: 0 to 200, and at most a fifth of all steps. -1: the preset's."),
                io.Float.Input("max_grad_norm", default=0.0, min=0.0, max=1e3, step=1e-3,
                               tooltip="Longest gradient, as its norm: longer ones are shortened to it. 0.1 to 10. 0: the preset's."),
                io.Float.Input("weight_decay", default=-1.0, min=-1.0, max=1.0, step=1e-5,
                               tooltip="Pull of the weights towards 0 each step, a share (0 to 0.1) of the learning rate. -1: the preset's."),
                io.Float.Input("ema_decay", default=-1.0, min=-1.0, max=0.99999, step=1e-5,
                               tooltip="Share of the averaged weights that stays at each step: 0.9 to 0.999; the average is what is measured and kept. 0: no "
                                       "average. -1: the preset's."),
                io.Int.Input("teacher_steps", default=0, min=0, max=200,
                             tooltip="Sampling steps of the teacher's recorded runs: 10 to 30; of a teacher made for few steps, their number. With "
                                     "'velocity' the student is meant for as many. 0: the preset's."),
                io.Float.Input("renoised", default=-1.0, min=-1.0, max=1.0, step=0.05,
                               tooltip="Share (0 to 1) of the training states that are finished clips with fresh noise, not on the teacher's path. More "
                                       "takes longer to ask. -1: the preset's. For 'velocity', with or without features."),
                io.Float.Input("full_range", default=-1.0, min=-1.0, max=1.0, step=0.05,
                               tooltip="Share (0 to 1) of the training states at evenly drawn noise levels, so that denoise below 1 works; with 'velocity' "
                                       "no more than 'renoised'. -1: the preset's."),
                io.Int.Input("evaluations", default=0, min=0, max=200,
                             tooltip="Times in the whole job that the held-out error is measured: 4 to 20; the best weights are kept. 0: the preset's."),
                io.Float.Input("save_every", default=0.0, min=0.0, max=1440.0, step=0.1,
                               tooltip="Minutes between checkpoints: 1 to 30. Cancel also saves its last step; only a crash loses more. 0: the preset's."),
                *(io.Combo.Input(lever, options=[AUTO, ON, OFF], default=AUTO,
                                 tooltip=f"{what} auto: when it would not fit otherwise.") for lever, what in LEVERS.items()),
                io.Int.Input("swapped_blocks", default=-1, min=-1, max=100,
                             tooltip="Blocks that lie in the computer's memory and visit the card one at a time: 0 to all of them. With adapters only. -1: "
                                     "as many as needed."),
                *(io.Float.Input(limit, default=0.0, min=0.0, max=most, step=step, tooltip=what) for limit, (most, step, what) in LIMITS.items()),
                io.Float.Input("boundary", default=0.0, min=0.0, max=0.999, step=0.001,
                               tooltip="Sigma (0 to 1) at which the low-noise one of 2.2's two experts takes over. 0: the student's, else WAN's own (0.875 "
                                       "for text, 0.9 for pictures)."),
            ],
            outputs=[Recipe.Output(display_name="recipe", tooltip="For WanLite Distill.")])

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool:
        if given.get(START_FROM) not in (None, folders.NONE):
            folders.lora_path(given.pop(START_FROM))
        check_widgets(cls, given)
        checked({name: value for name, value in given.items() if value is not None and name not in (START_FROM, BOUNDARY)})
        return True

    @classmethod
    def fingerprint_inputs(cls, start_from: str = folders.NONE, **_: Any) -> str:
        return "" if start_from == folders.NONE else folders.changed(folders.lora_path(start_from))

    @classmethod
    def execute(cls, start_from: str, boundary: float, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput({**checked(settings), **({} if start_from == folders.NONE else {START_FROM: start_from}),
                              **({BOUNDARY: boundary} if boundary else {})})


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """What was set, as the engine names it. Raises WanLiteError outside of what the engine takes, and where one setting leaves another without effect."""
    from ..wanlite_model.distill.job import Recipe as Settings
    from ..wanlite_model.distill.levers import LeverSettings
    given = {name: value for name, value in settings.items() if value not in (AS_PRESET, AUTO) and value != UNSET.get(name, 0)}
    given |= {lever: given[lever] == ON for lever in LEVERS if lever in given}
    levers = {field.name: given[field.name] for field in fields(LeverSettings) if field.name in given}
    Settings(**{name: value for name, value in given.items() if name not in levers})
    LeverSettings(**levers)
    _check_together(given)
    return given


def _check_together(given: dict[str, Any]) -> None:
    """Raises WanLiteError where a setting has no effect beside another. What the preset decides is not known here."""
    from ..wanlite_model.errors import WanLiteError
    objective, rank = given.get("objective"), given.get("rank")
    if objective == "distribution" and rank == 0:
        raise WanLiteError("objective is 'distribution' and rank is 0.", "The student and its critic are adapters over one copy of the teacher.",
                           "Set a rank, 64 for instance, or -1.")
    few = objective in ("trajectory", "distribution")
    unused = {"own_states": objective == "distribution", "renoised": few, "student_steps": objective is not None and not few}
    for name in (name for name, without in unused.items() if without and given.get(name, 0) > 0):          # 0 is what happens anyway
        raise WanLiteError(f"{name} is {given[name]:g} and objective is '{objective}'.", f"That objective makes no use of {name}.",
                           f"Set {name} to {UNSET.get(name, 0):g}, or choose another objective.")
    idle = {"frozen_float8", "swapped_blocks"} if rank == 0 else {"optimizer_8bit", "gradient_release"} if rank is not None else set()
    for name in (name for name in given if name in idle and given[name]):
        raise WanLiteError(f"{name} is {given[name] if name == 'swapped_blocks' else ON} and rank is {rank}.",
                           "With rank 0 no weight is frozen." if rank == 0 else "It is for training all weights; adapters are small.",
                           f"Set {name} to {UNSET[name] if name in UNSET else AUTO}, or rank to -1.")
    if rank and given.get("optimizer") == "Muon":
        raise WanLiteError(f"optimizer is 'Muon' and rank is {rank}.", "Adapters take AdamW.", f"Set optimizer to '{AS_PRESET}', or rank to 0.")
