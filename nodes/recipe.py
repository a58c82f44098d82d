"""Expert settings of a distillation, for whoever wants them."""
from typing import Any

from comfy_api.latest import io

from .sockets import Recipe


class WanLiteRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanLiteRecipe", display_name="WanLite Recipe", category="WanLite",
            description="Expert settings for WanLite Distill. Without it, the values shown here are used.",
            inputs=[
                io.Combo.Input("objective", options=["velocity", "velocity + features"], default="velocity",
                               tooltip="What the student is to match: the teacher's answer, or also what its blocks hand on, fading out over the "
                                       "job. The second keeps the teacher in memory and asks it at every step."),
                io.Float.Input("learning_rate", default=1e-4, min=1e-7, max=0.1, step=1e-7,
                               tooltip="Peak of AdamW's learning rate, reached after the warm-up; a cosine then lowers it to a tenth."),
                io.Int.Input("batch_size", default=4, min=1, max=1024, tooltip="Training states a step. More is steadier and slower."),
                io.Int.Input("warmup", default=50, min=0, max=10_000, tooltip="Steps until the peak learning rate, at most a fifth of all steps."),
                io.Float.Input("max_grad_norm", default=1.0, min=1e-3, max=1e3, step=1e-3,
                               tooltip="Gradients longer than this are shortened to it."),
                io.Float.Input("weight_decay", default=0.0, min=0.0, max=1.0, step=1e-5,
                               tooltip="AdamW's pull of the weights towards 0, a share of the learning rate per step."),
                io.Float.Input("ema_decay", default=0.99, min=0.0, max=0.99999, step=1e-5,
                               tooltip="How slowly the averaged weights follow, per step; the average is what is evaluated and kept. 0: no average."),
                io.Int.Input("teacher_steps", default=20, min=1, max=1000,
                             tooltip="Euler steps of the teacher's runs that are recorded to learn from; the student is meant for as many. "
                                     "Not used when SIGMAS are connected."),
                io.Float.Input("renoised", default=0.5, min=0.0, max=1.0, step=0.05,
                               tooltip="Share of the training states that are finished clips with fresh noise; the others are on the teacher's "
                                       "path. Each recorded run is noised again as often as this share asks for: 0.7 is 2.3 times for a step."),
                io.Float.Input("full_range", default=0.25, min=0.0, max=1.0, step=0.05,
                               tooltip="Share of those whose noise level is drawn evenly instead of by the shift, so that denoise below 1 works."),
                io.Int.Input("evaluations", default=8, min=1, max=1000,
                             tooltip="How often, in the whole job, the error on held-out states is measured; the best weights are kept."),
                io.Float.Input("save_every", default=10.0, min=0.1, max=1e6, step=0.1,
                               tooltip="Minutes between checkpoints. A cancelled run also saves its last step; only a crash loses more."),
            ],
            outputs=[Recipe.Output(display_name="recipe", tooltip="For WanLite Distill.")])

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        from ..wanlite_model.distill.job import Recipe as Settings
        return io.NodeOutput(Settings(**settings))
