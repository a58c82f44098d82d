"""Students: made from a teacher, saved so that every WAN reader opens them, and found again."""
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import folders
from .comfy_bridge.choices import EVERY_LEVEL, HIGH, LOW, WHOLE
from .report import told
from .sockets import Prompts, Student

CUSTOM = "custom"
PRESETS = {"same size": 1.0, "3/4 of the blocks": 0.75, "2/3 of the blocks": 2 / 3, "1/2 of the blocks": 0.5, CUSTOM: None}


class WanLiteCreateStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanLiteCreateStudent", display_name="WanLite Create Student", category="WanLite", is_output_node=True,
            description="Cuts a smaller WAN out of the teacher: keeps the blocks and FFN neurons that matter most for these prompts and refits "
                        "what is left. The start is kept under output/wanlite/starts; asking for the same again takes no time.",
            inputs=[
                io.Model.Input("model", tooltip="The teacher: a WAN MODEL from any loader, with or without LoRA. The LoRA becomes "
                                                "part of the student; the shift of ModelSamplingSD3 is read from it."),
                Prompts.Input("prompts", tooltip="What the teacher is watched on while blocks are chosen."),
                io.Latent.Input("latent", tooltip="Tells the size and the number of frames that the student is meant for; its content is not "
                                                  "used. EmptyHunyuanLatentVideo makes one."),
                io.Combo.Input("preset", options=list(PRESETS), default="2/3 of the blocks",
                               tooltip="How much of the teacher is kept, in whole blocks. 'custom' reads the three fields below."),
                io.Int.Input("depth", default=0, min=0, max=1000,
                             tooltip="custom: how many blocks to keep. 0 keeps as many as the teacher has, or as the keep-map names."),
                io.Int.Input("ffn_dim", default=0, min=0, max=1_000_000, step=1,
                             tooltip="custom: FFN neurons in each block. 0 keeps the teacher's. Fewer save memory more than time."),
                io.String.Input("keep_map", default="", placeholder="0-3,5,7-9",
                                tooltip="custom: exactly these of the teacher's blocks, counted from 0, as numbers and ranges. Empty: chosen."),
                io.Combo.Input("method", options=["spaced", "greedy", "influence", "interleaved"], default="spaced",
                               tooltip="How blocks are chosen: 'spaced' removes, one after another, the block that changes the teacher's answer "
                                       "least (some minutes), neighbours of a removed one last; 'greedy' takes neighbours too; 'influence' removes "
                                       "at once those that turn what they are fed the least (three passes over the states); 'interleaved' spreads "
                                       "them evenly (no time). Where that comes out better, it is what is taken. Not used with a keep-map."),
                io.Int.Input("block_steps", default=0, min=0, max=100_000,
                             tooltip="Steps for which each block, from the one before the first gap on, is trained by itself to do the work of those that are gone: "
                                     "one block at a time is on the card. 150 makes a far better start and takes minutes. 0: not at all."),
                io.Combo.Input("refit", options=["none", "mean", "least squares"], default="none",
                               tooltip="Folds what the removed blocks added into the cross attention of the block after each gap, computed without "
                                       "training: 'mean' moves its bias, 'least squares' its output layer too, which is worth it from a "
                                       "dozen prompts on. block_steps does more, and goes on from there."),
                io.Float.Input("cfg", default=5.0, min=1.0, max=100.0, step=0.1,
                               tooltip="Guidance scale of the teacher while it is watched; set it as in WanLite Distill."),
                io.Int.Input("probe_seed", default=0, min=0, max=2**31 - 1,
                             tooltip="Noise of the states that blocks are judged on. Another number may choose other blocks."),
                io.Combo.Input("expert", options=[WHOLE, HIGH, LOW, EVERY_LEVEL], default=WHOLE,
                               tooltip="For 2.2 A14B, whose two files are one model: which of them the MODEL is. Its student is judged on its own side of the boundary "
                                       "(sigma 0.875 for text, 0.9 for pictures). 'low noise, at every level': the low one as a model of its own, for single pictures."),
                io.Model.Input("other_expert", optional=True, tooltip="The other file of 2.2 A14B, through the same ModelSamplingSD3. The teacher's videos are made by both."),
            ],
            outputs=[Student.Output(display_name="student", tooltip="The untrained start, for WanLite Distill or WanLite Save Student."),
                     io.String.Output(display_name="report", tooltip="What was kept, and how far from the teacher it is before training.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, depth: int | None = None, ffn_dim: int | None = None, keep_map: str | None = None,
                        preset: str = CUSTOM) -> bool | str:
        if preset not in PRESETS:
            return f"preset is {preset!r}. Choose one of {', '.join(PRESETS)}."
        if preset != CUSTOM and (depth or ffn_dim or keep_map):
            return (f"The preset '{preset}' decides the size, and depth, ffn_dim or keep_map say it again. Set them to 0 and empty, or choose "
                    "'custom'.")
        return True

    @classmethod
    def execute(cls, model: Any, prompts: Any, latent: dict, preset: str, depth: int, ffn_dim: int, keep_map: str, method: str, block_steps: int,
                refit: str, cfg: float, probe_seed: int, expert: str, other_expert: Any = None) -> io.NodeOutput:
        from ..wanlite_model.compress.build import create_student
        from ..wanlite_model.compress.plan import parse_keep_map
        from .comfy_bridge.experts import expert_note, other_of
        from .comfy_bridge.latents import shape_of
        from .comfy_bridge.runtime import Bar, drive
        from .comfy_bridge.teacher import ComfyTeacher
        teacher = ComfyTeacher(model)
        layers, share = teacher.config.num_layers, PRESETS[preset]
        keep = parse_keep_map(keep_map, layers) if keep_map.strip() else None
        bar, other = Bar(cls.hidden.unique_id), other_of(teacher, other_expert, expert)
        student, report = drive(
            create_student(teacher, prompts, shape_of(latent, teacher.config.out_dim), keep=keep, method=method, block_steps=block_steps,
                           refit=refit, seed=probe_seed, cfg=cfg, other=other,
                           depth=max(1, round(layers * share)) if share else depth or None, ffn_dim=ffn_dim or None,
                           folder=folders.output_folder("starts")),
            lambda event: bar.show(event.stage, event.done, event.total))
        report = "\n".join((report, *teacher.notes, *expert_note(teacher.config, other, expert)))
        return io.NodeOutput(student, report, ui=told("Create Student", report))


class WanLiteSaveStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..wanlite_model.formats.pairs import DTYPES, LAYOUTS
        return io.Schema(
            node_id="WanLiteSaveStudent", display_name="WanLite Save Student", category="WanLite", is_output_node=True,
            description="Saves a student for the reader of your choice, opens it with that reader and compares one forward before it is put in place. "
                        "A ready workflow of stock nodes with the right steps, cfg and shift is saved with it.",
            inputs=[
                Student.Input("student", tooltip="The student to save."),
                io.String.Input("name", default="wanlite-student",
                                tooltip="Its name below models/diffusion_models: letters, digits, spaces, - and _."),
                io.Combo.Input("format", options=list(LAYOUTS), default="folder",
                               tooltip="'folder' opens in ComfyUI, in Wan's own code and in diffusers' from_single_file. 'single file' is one .safetensors "
                                       "with nothing beside it. 'diffusers folder', below output/wanlite/diffusers, is for diffusers' "
                                       "from_pretrained. 'LoRA', for a student that was trained as one: a small file in models/loras, for the "
                                       "teacher and its kin. 'GGUF' is for the custom node ComfyUI-GGUF. Workflows of files go to "
                                       "output/wanlite/workflows."),
                io.Combo.Input("dtype", options=list(DTYPES), default="bf16",
                               tooltip="Of the saved weights. bf16 and fp16 take 2 bytes a parameter, fp32 takes 4. What Distill hands on is bf16: "
                                       "fp32 makes its file larger, not better. fp8 takes 1 and is for a single file in ComfyUI; Q8_0, Q5_0 and Q4_0 "
                                       "take 1.1, 0.7 and 0.6 and are GGUF's. What they change is measured and told."),
                io.Boolean.Input("overwrite", default=False,
                                 tooltip="Replace a student of this name. What WanLite did not write is never replaced."),
                io.String.Input("base_model", default="", placeholder="Wan 2.1 T2V 1.3B",
                                tooltip="For a folder's model card: what the teacher is, in words, or as owner/name on Hugging Face, which links it there."),
                io.String.Input("licence", default="", placeholder="Apache-2.0",
                                tooltip="For a folder's model card: the licence of the base model. Empty: the card says that it is not stated."),
                io.Image.Input("picture", optional=True, tooltip="For a folder's model card: its first frame is saved beside it as picture.png."),
            ],
            outputs=[io.String.Output(display_name="file_name", tooltip="As Load Diffusion Model lists it."),
                     io.String.Output(display_name="report", tooltip="What was saved, whether its reader agreed, and which readers open it.")])

    @classmethod
    def validate_inputs(cls, name: str | None = None, format: str | None = None, dtype: str | None = None, base_model: str | None = None,
                        licence: str | None = None) -> bool | str:
        from ..wanlite_model.errors import WanLiteError
        from ..wanlite_model.formats.model_card import Stated
        from ..wanlite_model.formats.pairs import check_pair
        from ..wanlite_model.formats.place import check_name
        try:
            if name is not None:
                check_name(name)
            if format is not None and dtype is not None:
                check_pair(format, dtype)
            Stated(base_model=base_model or "", licence=licence or "")
        except WanLiteError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, student: Any, name: str, format: str, dtype: str, overwrite: bool, base_model: str = "", licence: str = "",
                picture: Any = None) -> io.NodeOutput:
        from ..wanlite_model.formats.model_card import Stated
        from .comfy_bridge.runtime import png
        from .comfy_bridge.save import save
        stated = Stated(base_model=base_model, licence=licence, picture=b"" if picture is None else png(picture[0]))
        report = save(student, name, layout=format, dtype=dtype, overwrite=overwrite, stated=stated)
        return io.NodeOutput(folders.stock_name(report.path if format == "diffusers folder" else report.file), report.text,
                             ui=told("Save Student", report.text))


class WanLiteLoadStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folders.model_names()
        return io.Schema(
            node_id="WanLiteLoadStudent", display_name="WanLite Load Student", category="WanLite",
            description="A saved student, to sample it or to go on distilling it. Any other WAN file is taken as a student that keeps all blocks. What a "
                        "predecessor of WanLite wrote is read as a recipe: field by field, and what to set to get such a student from a WAN.",
            inputs=[io.Combo.Input("name", options=[*names, *folders.recipe_names(names)],
                                   tooltip="A file or folder below models/diffusion_models. A student's recommended shift is set on its MODEL.")],
            outputs=[Student.Output(display_name="student", tooltip="For WanLite Distill, or to be saved in another format."),
                     io.Model.Output(display_name="model", tooltip="Ready for a stock KSampler: its shift is set.")])

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        return folders.changed(folders.model_path(name))

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        from ..wanlite_model.compress.handle import StudentHandle
        from .comfy_bridge.load import open_model
        path = folders.found(name)
        student = StudentHandle.of(path)
        return io.NodeOutput(student, open_model(path, student.card.shift if student.card else None))
