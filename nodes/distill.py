"""The distillation itself: queue, cancel, queue again, and it goes on where it stopped."""
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import folders
from .comfy_bridge.choices import AS_MADE, EVERY_LEVEL, HIGH, LOW, WHOLE
from .report import told
from .sockets import Prompts, Recipe, Student

class WanLiteDistill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..wanlite_model.distill.presets import PRESETS
        return io.Schema(
            node_id="WanLiteDistill", display_name="WanLite Distill", category="WanLite", is_output_node=True,
            description="Teaches the student what the teacher answers. Cancel keeps everything done so far: queueing the same again goes on "
                        "where it stopped, and a finished run comes back from disk.",
            inputs=[
                Student.Input("student", tooltip="What to train: from WanLite Create Student, or a saved one. It is not changed; the result "
                                                 "is new."),
                io.Model.Input("model", tooltip="The teacher it was made from. Its ModelSamplingSD3 shift is the one the student is trained for."),
                Prompts.Input("prompts", tooltip="What the teacher is asked about. From 8 prompts on, whole prompts are held out of training "
                                                 "to measure the error on."),
                io.Latent.Input("latent", tooltip="Size and number of frames to train at. An empty LATENT needs no data: the teacher makes it. "
                                                  "A LATENT with clips is training data too: clip i belongs to prompt i, or one prompt "
                                                  "serves all."),
                io.Vae.Input("vae", optional=True, tooltip="Shows a sample on the node at every evaluation. Costs the time of drawing it."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="The noise levels that the student is to be sampled along, from 1 down to 0: "
                                                                 "with a few-step preset as many steps as it makes, else the teacher's. "
                                                                 "Without it: the 'simple' scheduler at the teacher's shift."),
                Recipe.Input("recipe", optional=True, tooltip="Expert settings from WanLite Recipe."),
                io.Combo.Input("preset", options=list(PRESETS), default="slim",
                               tooltip="What to make. " + " ".join(f"{name}: {preset.told}." for name, preset in PRESETS.items()) + " Where cfg is 1 afterwards, the negative prompt has no "
                                       "effect. Presets can follow each other: the student of one is the student to train for the next."),
                io.Float.Input("cfg", default=5.0, min=1.0, max=100.0, step=0.1,
                               tooltip="The teacher's guidance scale. 1 asks it without guidance; if that is because it was made for few steps, "
                                       "set teacher_steps in WanLite Recipe to their number too. Of two experts it is both's."),
                io.Float.Input("minutes", default=30.0, min=0.0, max=1e6, step=0.1,
                               tooltip="Length of the whole job in minutes, of which up to 40% go into asking the teacher. Counts when steps "
                                       "is 0. A run that is asked for more goes on with another leg; asked for less it ends at its next evaluation. "
                                       "0: nothing is trained, the run's folder is made complete for `python -m wanlite_model run`."),
                io.Int.Input("steps", default=0, min=0, max=10_000_000,
                             tooltip="Training steps. 0: as many as the minutes allow, measured once at the start. More or fewer than a run was begun "
                                     "for continue it too."),
                io.String.Input("run_name", default="run-1",
                                tooltip="Its folder below output/wanlite/runs. The same name with the same settings goes on or comes back; "
                                        "with other settings it is refused, and nothing is lost."),
                io.Int.Input("train_seed", default=0, min=0, max=2**31 - 1,
                             tooltip="Decides noise and order of the training. The same seed is the same run."),
                io.Combo.Input("expert", options=[AS_MADE, WHOLE, HIGH, LOW, EVERY_LEVEL], default=AS_MADE,
                               tooltip="For 2.2 A14B, whose two files are one model: which of them the MODEL is, and its student with it. It is trained and measured on "
                                       "its own side of the boundary, on videos that both make; jobs for both share the teacher's answers."),
                io.Model.Input("other_expert", optional=True,
                               tooltip="The other file of 2.2 A14B, through the same ModelSamplingSD3. It rolls out its own steps of the teacher's videos."),
            ],
            outputs=[Student.Output(display_name="student", tooltip="The trained student, for WanLite Save Student."),
                     io.Model.Output(display_name="model", tooltip="Ready for a stock KSampler: its shift is set."),
                     io.LossMap.Output(display_name="loss_map", tooltip="For the stock Plot Loss Graph."),
                     io.String.Output(display_name="report", tooltip="What was reached, on held-out states, in words."),
                     io.Image.Output(display_name="chart", tooltip="Loss, held-out error and the plain cut's error as a picture.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, run_name: str | None = None) -> bool | str:
        from ..wanlite_model.errors import WanLiteError
        from ..wanlite_model.formats.place import check_name
        try:
            return run_name is None or bool(check_name(run_name, "a run"))
        except WanLiteError as error:
            return str(error)

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
