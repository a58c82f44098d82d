"""The distillation itself: queue, cancel, queue again, and it goes on where it stopped."""
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import folders
from .comfy_bridge.choices import AS_MADE, EVERY_LEVEL, HIGH, LOW, WHOLE
from .report import told
from .sockets import Prompts, Recipe, Student
from .widgets import check_expert, check_widgets


class WanLiteDistill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..wanlite_model.distill.presets import PRESETS
        told = (f"{name}: {preset.told}" for name, preset in PRESETS.items())
        return io.Schema(
            node_id="WanLiteDistill", display_name="WanLite Distill", category="WanLite", is_output_node=True,
            description="Teaches the student what the teacher answers. Cancel keeps everything done so far: queueing the same again goes on "
                        "where it stopped, and a finished run comes back from disk.",
            inputs=[
                Student.Input("student", tooltip="What to train: from WanLite Create Student, or a saved one. It is not changed; the result is new."),
                io.Model.Input("model", tooltip="The teacher it was made from. Its ModelSamplingSD3 shift is the one the student is trained for."),
                Prompts.Input("prompts", tooltip="What the teacher is asked about: 24 prompts or more. From 8 on, whole prompts are held out of training to "
                                                 "measure on."),
                io.Latent.Input("latent", tooltip="Size and number of frames to train at. Empty: the teacher makes the data. With clips in it: clip i "
                                                  "belongs to prompt i, or one prompt serves all."),
                io.Vae.Input("vae", optional=True, tooltip="Shows a sample on the node at every evaluation. Costs the time of drawing it."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels, from 1 down to 0, that the student is to be sampled along. Open: the "
                                                                 "'simple' scheduler at the teacher's shift."),
                Recipe.Input("recipe", optional=True, tooltip="Expert settings from WanLite Recipe. Open: the preset's."),
                io.Combo.Input("preset", options=list(PRESETS), default="slim", tooltip=f"What to make. {'; '.join(told)}."),
                io.String.Input("run_name", default="run-1",
                                tooltip="Its folder below output/wanlite/runs. The same name with the same settings goes on or comes back; with other "
                                        "settings it is refused, and nothing is lost."),
                io.Float.Input("minutes", default=30.0, min=0.0, max=43_200.0, step=0.1,
                               tooltip="Length of the whole job in minutes, asking the teacher included: 30 to 300. Raise it later and the run goes on. 0: "
                                       "only prepares the run, for `python -m wanlite_model run`."),
                io.Float.Input("cfg", default=5.0, min=1.0, max=30.0, step=0.1,
                               tooltip="The teacher's guidance scale (cfg), as you sample with it: 3 to 7. 1: asked without guidance; if it was made for few "
                                       "steps, set teacher_steps in WanLite Recipe too."),
                io.Int.Input("steps", default=0, min=0, max=1_000_000,
                             tooltip="Training steps: 500 to 5000. 0: as many as the minutes allow, measured once at the start. Raise it later and the run "
                                     "goes on."),
                io.Combo.Input("expert", options=[AS_MADE, WHOLE, HIGH, LOW, EVERY_LEVEL], default=AS_MADE,
                               tooltip="For 2.2 A14B, whose two files are one model: which of them the MODEL is, and its student with it. It is trained and "
                                       "measured on its own side of the boundary."),
                io.Int.Input("train_seed", default=0, min=0, max=2**31 - 1,
                             tooltip="Seed, a whole number: decides noise and order of the training. The same seed is the same run."),
                io.Model.Input("other_expert", optional=True,
                               tooltip="The other file of 2.2 A14B, through the same ModelSamplingSD3. It makes its own steps of the teacher's videos."),
            ],
            outputs=[Student.Output(display_name="student", tooltip="The trained student, for WanLite Save Student."),
                     io.Model.Output(display_name="model", tooltip="Ready for a stock KSampler: its shift is set."),
                     io.LossMap.Output(display_name="loss_map", tooltip="For the stock Plot Loss Graph."),
                     io.String.Output(display_name="report", tooltip="What was reached, on held-out states, in words."),
                     io.Image.Output(display_name="chart", tooltip="Loss, held-out error and the plain cut's error as a picture.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool:
        from ..wanlite_model.formats.place import check_name
        if given.get("run_name") is not None:
            check_name(given["run_name"], "a run")
        check_widgets(cls, given)
        check_expert(given)
        return True

    @classmethod
    def execute(cls, student: Any, model: Any, prompts: Any, latent: dict, preset: str, cfg: float, minutes: float, steps: int,
                run_name: str, train_seed: int, expert: str, other_expert: Any = None, vae: Any = None, sigmas: Any = None,
                recipe: Any = None) -> io.NodeOutput:
        from .chart import loss_map, picture
        from .comfy_bridge.load import open_student
        from .comfy_bridge.training import Training
        training = Training.of(student=student, model=model, prompts=prompts, latent=latent, sigmas=sigmas, preset=preset, changes=recipe or {},
                               expert=expert, other_expert=other_expert, vae=vae, cfg=cfg, minutes=minutes, steps=steps, train_seed=train_seed)
        folder = folders.output_folder("runs") / run_name
        finished = training.run(folder, folders.output_folder("cache"), cls.hidden.unique_id)
        if finished is None:
            prepared = (f"Prepared. In WanLite's folder, `python -m wanlite_model run \"{folder}\"` trains it without ComfyUI; queue this graph again "
                        "afterwards, or with minutes above 0 to train here.")
            return io.NodeOutput(ui=told("Distill", prepared), block_execution=prepared)
        report = "\n".join((finished.report, *training.notes))
        trained = open_student(finished.handle, training.teacher.model if finished.handle.same_as == training.teacher.fingerprint else None)
        chart = picture(finished.losses, finished.evaluations, finished.plain_cut, finished.yardstick)
        return io.NodeOutput(finished.handle, trained, loss_map(finished.losses), report, chart, ui=told("Distill", report))
