"""Teacher and student side by side, from the same noise, with what they cost."""
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import sampling
from .comfy_bridge.choices import EVERY_LEVEL, HIGH, LOW, WHOLE
from .report import told
from .sockets import Prompts
from .widgets import check_expert, check_widgets


class WanLiteCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def settings(who: str, steps: int, cfg: float, extra: str = "") -> list[io.Input]:
            return [io.Int.Input(f"{who}_steps", default=steps, min=1, max=200, tooltip=f"Sampling steps of the {who}{extra}: 4 to 50."),
                    io.Float.Input(f"{who}_cfg", default=cfg, min=1.0, max=30.0, step=0.1,
                                   tooltip=f"Guidance scale (cfg) of the {who}{extra}: 1 to 7. At 1 ComfyUI asks once a step instead of twice.")]
        return io.Schema(
            node_id="WanLiteCompare", display_name="WanLite Compare", category="WanLite", is_output_node=True,
            description="Samples the same prompts from the same noise with each MODEL, and measures: parameters, bytes, seconds a clip once "
                        "warm, how close the clips are to the teacher's, and whether they are as sharp and move as much. The teacher's clips are kept: "
                        "comparing the next student does not sample them again.",
            inputs=[
                io.Model.Input("teacher", tooltip="The MODEL that the others are compared with."),
                io.Model.Input("student", tooltip="The student's MODEL, with its shift, from WanLite Distill or WanLite Load Student."),
                io.Model.Input("third", optional=True, tooltip="One more MODEL, for instance the teacher with a speed LoRA that you "
                                                                "would take otherwise."),
                Prompts.Input("prompts", tooltip="The first of these prompts are sampled."),
                io.Vae.Input("vae", tooltip="WAN's VAE, which turns latents into pictures."),
                io.Latent.Input("latent", tooltip="Tells the size and the number of frames; its content is not used."),
                io.Int.Input("clips", default=2, min=1, max=64, tooltip="Number of prompts, from the first on, that are sampled and measured: 1 to 8."),
                *settings("student", 20, 1.0), *settings("teacher", 30, 5.0), *settings("third", 20, 1.0, " MODEL, when there is one"),
                io.Combo.Input("sampler", options=sampling.samplers(), default="euler",
                               tooltip="ComfyUI's sampler, for all of them. Students are made for euler."),
                io.Combo.Input("scheduler", options=sampling.schedulers(), default="simple",
                               tooltip="ComfyUI's scheduler, for all of them. Students are made for simple."),
                io.Int.Input("noise_number", default=0, min=0, max=2**31 - 1,
                             tooltip="Seed of the noise, a whole number: the same for every MODEL. Another number, other clips."),
                io.Combo.Input("expert", options=[WHOLE, HIGH, LOW, EVERY_LEVEL], default=WHOLE,
                               tooltip="For 2.2 A14B: which of its two experts these MODELs are."),
                io.Float.Input("boundary", default=0.0, min=0.0, max=0.999, step=0.001,
                               tooltip="Of two experts: the sigma (0 to 1) at which the one of low noise takes over. 0: WAN's own (0.875 for text, 0.9 for "
                                       "pictures)."),
                io.Model.Input("other_expert", optional=True,
                               tooltip="The other file of 2.2 A14B. It makes the steps on its side of every clip, as many as the teacher's steps have there, "
                                       "at the teacher's cfg."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="Frames of all clips, one MODEL beside the other."),
                     io.String.Output(display_name="metrics", tooltip="Size, speed and closeness of each MODEL, in words."),
                     io.Float.Output(display_name="teacher_seconds", tooltip="The teacher's seconds a clip, warm, sampling alone."),
                     io.Float.Output(display_name="student_seconds", tooltip="The student's seconds a clip, warm, sampling alone."),
                     io.Int.Output(display_name="student_bytes", tooltip="The student's weights as ComfyUI holds them.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool:
        check_widgets(cls, given)
        check_expert(given)
        return True

    @classmethod
    def execute(cls, teacher: Any, student: Any, prompts: Any, vae: Any, latent: dict, sampler: str, scheduler: str, clips: int,
                noise_number: int, expert: str, boundary: float, third: Any = None, other_expert: Any = None, **settings: Any) -> io.NodeOutput:
        from .comfy_bridge.clips import How, contenders
        from .comfy_bridge.compare import compare
        models = {"teacher": teacher, "student": student, **({"third": third} if third is not None else {})}
        asked = {who: (model, settings[f"{who}_steps"], settings[f"{who}_cfg"]) for who, model in models.items()}
        result = compare(contenders(asked, other_expert, expert, boundary), prompts=prompts, vae=vae, latent=latent, how=How(sampler, scheduler),
                         clips=clips, noise_number=noise_number, node_id=cls.hidden.unique_id)
        first, second = result.measured[:2]
        return io.NodeOutput(result.images, result.text, first.seconds, second.seconds, second.bytes, ui=told("Compare", result.text))
