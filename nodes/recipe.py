"""Expert settings of a distillation, for whoever wants them. What is left as it is stays the preset's."""
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import folders
from .sockets import Recipe

AS_PRESET = "as the preset"
START_FROM, BOUNDARY = "start_from", "boundary"         # the settings that are no fields of the engine's Recipe
UNSET = {"rank": -1, "own_states": -1.0, "renoised": -1.0, "full_range": -1.0, "ema_decay": -1.0, "weight_decay": -1.0, "warmup": -1, "swapped_blocks": -1}
AUTO, ON, OFF = "auto", "on", "off"
LEVERS = {
    "checkpointing": "Blocks are computed a second time in backward instead of being remembered: a third slower, for a fraction of the memory.",
    "checkpoints_on_cpu": "What blocks are computed again from waits in the computer's memory, not on the card.",
    "frozen_float8": "With adapters: the frozen weights are held in float8, half of bf16. The adapters learn over the rounded weights.",
    "optimizer_8bit": "Without adapters: AdamW with 8-bit moments, in place of Muon too, on bf16 weights: a third of the memory.",
    "gradient_release": "With 8-bit AdamW: weights move as soon as their gradient is there, which is then freed. A batch that goes through in parts moves them "
                        "with each part, by as much less."}
LIMITS = {          # in GiB: the most, the step, and what of
    "gpu_gib": (10_000.0, 0.5, "Memory of the card that the job is planned for, in GiB, for a run that is prepared for another machine. 0: what is free here."),
    "ram_gib": (100_000.0, 0.5, "The same of the computer's memory."),
    "disk_gib": (1e6, 1.0, "The same of the disk."),
    "cache_gib": (1e6, 1.0, "What the teacher's recorded answers of all jobs may take on disk, in GiB: where they would take more, those that were used longest "
                            "ago are removed, but none of this job's. 0: no limit."),
    "runs_gib": (1e6, 1.0, "The same of all runs, with the students in them that were not saved elsewhere: those that were worked on longest ago are removed, "
                           "but none that a job works on. 0: no limit; a run's folder can also be deleted by hand.")}


class WanLiteRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanLiteRecipe", display_name="WanLite Recipe", category="WanLite",
            description="Expert settings for WanLite Distill, in place of its preset's. What is left at 'as the preset', at 0, or at -1 where 0 means "
                        "something, stays the preset's.",
            inputs=[
                io.Combo.Input("objective", options=[AS_PRESET, "velocity", "velocity + features", "trajectory", "distribution"], default=AS_PRESET,
                               tooltip="What the student is to match. 'velocity': the teacher's answer. 'velocity + features': also what its blocks "
                                       "hand on, fading out over the job; keeps the teacher in memory and asks it at every step. 'trajectory': the "
                                       "teacher's path in a few steps of the student's own. 'distribution': goes on from the LoRA of a few-step preset and "
                                       "moves its clips to where the teacher finds them likely (DMD2), which sharpens; a hundred steps or two do, and it "
                                       "can do too much: brightness, contrast, sharpness and motion are what is measured."),
                io.Int.Input("rank", default=-1, min=-1, max=4096,
                             tooltip="Above 0: LoRA adapters of this rank are trained, the student's own weights stay. 0: all weights are trained, which "
                                     "takes several times the memory. -1: the preset's."),
                io.Combo.Input("start_from", options=[folders.NONE, *folders.lora_names()], default=folders.NONE,
                               tooltip="A LoRA for the teacher that training begins with, for instance a speed LoRA that was made for another WAN: it is "
                                       "healed to this one. For a student of the teacher's own size."),
                io.Int.Input("student_steps", default=0, min=0, max=100,
                             tooltip="trajectory and distribution: steps that the student is made for. 0: the preset's. Not used when SIGMAS are connected."),
                io.Float.Input("own_states", default=-1.0, min=-1.0, max=1.0, step=0.05,
                               tooltip="Share of the training states that the student comes to by itself. trajectory: from there it learns to return to the "
                                       "teacher's path. velocity: the teacher is asked there at every step, which takes time and memory. Not used with 'distribution'. -1: the preset's."),
                io.Combo.Input("optimizer", options=[AS_PRESET, "AdamW", "Muon"], default=AS_PRESET,
                               tooltip="'Muon' moves the blocks' matrices in all directions alike, which can need fewer steps and holds one number a "
                                       "weight less in memory; all else, and adapters, take AdamW."),
                io.Float.Input("learning_rate", default=0.0, min=0.0, max=0.1, step=1e-7,
                               tooltip="Peak of the learning rate, reached after the warm-up; a cosine then lowers it to a tenth. 0: the preset's."),
                io.Int.Input("batch_size", default=0, min=0, max=1024, tooltip="Training states a step. More is steadier and slower. 0: the preset's."),
                io.Int.Input("warmup", default=-1, min=-1, max=10_000,
                             tooltip="Steps until the peak learning rate, at most a fifth of all steps. -1: the preset's."),
                io.Float.Input("max_grad_norm", default=0.0, min=0.0, max=1e3, step=1e-3,
                               tooltip="Gradients longer than this are shortened to it. 0: the preset's."),
                io.Float.Input("weight_decay", default=-1.0, min=-1.0, max=1.0, step=1e-5,
                               tooltip="The optimizer's pull of the weights towards 0, a share of the learning rate per step. -1: the preset's."),
                io.Float.Input("ema_decay", default=-1.0, min=-1.0, max=0.99999, step=1e-5,
                               tooltip="How slowly the averaged weights follow, per step; the average is what is evaluated and kept. 0: no average. "
                                       "-1: the preset's."),
                io.Int.Input("teacher_steps", default=0, min=0, max=1000,
                             tooltip="Euler steps of the teacher's runs that are recorded; with 'velocity' the student is meant for as "
                                     "many; with 'trajectory' each of its steps is made of several of these. 0: the preset's. With SIGMAS connected, 'velocity' "
                                     "takes theirs."),
                io.Float.Input("renoised", default=-1.0, min=-1.0, max=1.0, step=0.05,
                               tooltip="Share of the training states that are finished clips with fresh noise; the others are on the teacher's "
                                       "path. Each recorded run is noised again as often as this share asks for: 0.7 is 2.3 times for a step. -1: the "
                                       "preset's. Not used with 'trajectory' and 'distribution', nor with a teacher of 8 steps or fewer at cfg 1."),
                io.Float.Input("full_range", default=-1.0, min=-1.0, max=1.0, step=0.05,
                               tooltip="Share of the training states whose noise level is drawn evenly instead of by the shift, so that denoise below 1 works (they "
                                       "are re-noised ones: no more than 'renoised'); with 'trajectory', of states between the student's own steps. -1: the preset's."),
                io.Int.Input("evaluations", default=0, min=0, max=1000,
                             tooltip="How often, in the whole job, the error on held-out states is measured; the best weights are kept. 0: the preset's."),
                io.Float.Input("save_every", default=0.0, min=0.0, max=1e6, step=0.1,
                               tooltip="Minutes between checkpoints. A cancelled run also saves its last step; only a crash loses more. 0: the preset's."),
                *(io.Combo.Input(lever, options=[AUTO, ON, OFF], default=AUTO,
                                 tooltip=f"{what} auto: when it would not fit otherwise.") for lever, what in LEVERS.items()),
                io.Int.Input("swapped_blocks", default=-1, min=-1, max=1000,
                             tooltip="With adapters: so many blocks lie in the computer's memory and visit the card one at a time. -1: as many as needed."),
                *(io.Float.Input(limit, default=0.0, min=0.0, max=most, step=step, tooltip=what) for limit, (most, step, what) in LIMITS.items()),
                io.Float.Input("boundary", default=0.0, min=0.0, max=0.999, step=0.001,
                               tooltip="Of 2.2's two experts: the sigma at which the one of low noise takes over. 0: the student's, else WAN's own (0.875 for "
                                       "text, 0.9 for pictures)."),
            ],
            outputs=[Recipe.Output(display_name="recipe", tooltip="For WanLite Distill.")])

    @classmethod
    def fingerprint_inputs(cls, start_from: str = folders.NONE, **_: Any) -> str:
        return "" if start_from == folders.NONE else folders.changed(folders.lora_path(start_from))

    @classmethod
    def execute(cls, start_from: str, boundary: float, **settings: Any) -> io.NodeOutput:
        from ..wanlite_model.distill.job import Recipe as Settings
        from ..wanlite_model.distill.levers import LeverSettings
        given = {name: value for name, value in settings.items() if value not in (AS_PRESET, AUTO) and value != UNSET.get(name, 0)}
        given |= {lever: given[lever] == ON for lever in LEVERS if lever in given}
        levers = {field.name: given[field.name] for field in fields(LeverSettings) if field.name in given}
        Settings(**{name: value for name, value in given.items() if name not in levers})            # refused here, on the node that is wrong
        LeverSettings(**levers)
        return io.NodeOutput({**given, **({} if start_from == folders.NONE else {START_FROM: start_from}), **({BOUNDARY: boundary} if boundary else {})})
