"""Students: made from a teacher, saved so that every WAN reader opens them, and found again."""
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import folders
from .comfy_bridge.choices import EVERY_LEVEL, HIGH, LOW, WHOLE
from .report import told
from .sockets import Prompts, Student
from .widgets import check_expert, check_widgets

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
                io.Model.Input("model", tooltip="The teacher: a WAN MODEL from any loader, with or without LoRA. The LoRA becomes part of the student; the "
                                                "shift of ModelSamplingSD3 is read from it."),
                Prompts.Input("prompts", tooltip="What the teacher is watched on while blocks are chosen."),
                io.Latent.Input("latent", tooltip="Tells the size and the number of frames that the student is meant for; its content is not used. "
                                                  "EmptyHunyuanLatentVideo makes one."),
                io.Combo.Input("preset", options=list(PRESETS), default="2/3 of the blocks",
                               tooltip="How much of the teacher is kept, in whole blocks. 'same size' for no-cfg and few steps. 'custom' reads depth, "
                                       "ffn_dim and keep_map."),
                io.Int.Input("block_steps", default=0, min=0, max=10_000,
                             tooltip="Steps for which each block from the first gap on is trained by itself, one at a time on the card: 100 to 500. 150 "
                                     "makes a far better start and takes minutes. 0: not at all."),
                io.Float.Input("cfg", default=5.0, min=1.0, max=30.0, step=0.1,
                               tooltip="Guidance scale (cfg) of the teacher while it is watched: 3 to 7, the same as in WanLite Distill."),
                io.Combo.Input("expert", options=[WHOLE, HIGH, LOW, EVERY_LEVEL], default=WHOLE,
                               tooltip="For 2.2 A14B, whose two files are one model: which of them the MODEL is. 'low noise, at every level': the low one as "
                                       "a model of its own, for single pictures."),
                io.Int.Input("depth", default=0, min=0, max=100,
                             tooltip="custom: blocks to keep, of the teacher's 30 (1.3B, 5B) or 40 (14B). 0: as many as the teacher has, or as the keep-map "
                                     "names."),
                io.Int.Input("ffn_dim", default=0, min=0, max=65_536, step=1,
                             tooltip="custom: FFN neurons in each block: 4096 to the teacher's 8960 (1.3B), 13824 (14B) or 14336 (5B). 0: the teacher's. "
                                     "Fewer save memory more than time."),
                io.String.Input("keep_map", default="", placeholder="0-3,5,7-9",
                                tooltip="custom: exactly these of the teacher's blocks, counted from 0, as numbers and ranges. Empty: chosen."),
                io.Combo.Input("method", options=["spaced", "greedy", "influence", "interleaved"], default="spaced",
                               tooltip="How blocks are chosen. 'spaced': those that change the answer least go, neighbours last (some minutes). 'greedy': "
                                       "neighbours too. 'influence': at once (quick). 'interleaved': evenly (no time). Not used with a keep-map."),
                io.Combo.Input("refit", options=["none", "mean", "least squares"], default="none",
                               tooltip="Folds what removed blocks added into the block after each gap, without training: 'mean' moves a bias, 'least "
                                       "squares' a layer too, from a dozen prompts on. block_steps does more, and goes on from there."),
                io.Int.Input("probe_seed", default=0, min=0, max=2**31 - 1,
                             tooltip="Seed, a whole number, of the noise that blocks are judged on. Another number may choose other blocks."),
                io.Model.Input("other_expert", optional=True, tooltip="The other file of 2.2 A14B, through the same ModelSamplingSD3. The teacher's videos "
                                                                      "are made by both."),
            ],
            outputs=[Student.Output(display_name="student", tooltip="The untrained start, for WanLite Distill or WanLite Save Student."),
                     io.String.Output(display_name="report", tooltip="What was kept, and how far from the teacher it is before training.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool:
        from ..wanlite_model.compress.plan import parse_keep_map
        from ..wanlite_model.errors import WanLiteError
        check_widgets(cls, given)
        check_expert(given)
        depth, ffn_dim, keep_map = given.get("depth"), given.get("ffn_dim"), (given.get("keep_map") or "").strip()
        if given.get("preset", CUSTOM) not in (None, CUSTOM) and (depth or ffn_dim or keep_map):
            raise WanLiteError(f"The preset '{given['preset']}' decides the size, and depth, ffn_dim or keep_map say it again.", "",
                               f"Set them to 0 and empty, or choose '{CUSTOM}'.")
        if keep_map:
            kept = parse_keep_map(keep_map)
            if depth and depth != len(kept):
                raise WanLiteError(f"depth is {depth}, and the keep-map names {len(kept)} blocks.", "", f"Set depth to 0 or {len(kept)}.")
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
                               tooltip="'folder': for ComfyUI, Wan's code and diffusers. 'single file': one .safetensors. 'diffusers folder': below "
                                       "output/wanlite/diffusers. 'LoRA': of a student trained as one, in models/loras. 'GGUF': for ComfyUI-GGUF."),
                io.Combo.Input("dtype", options=list(DTYPES), default="bf16",
                               tooltip="Bytes a weight: bf16 and fp16 2, fp32 4 (larger, not better), fp8 1 (single file only); for GGUF Q8_0 1.1, Q5_0 0.7, "
                                       "Q4_0 0.6. What rounding changes is measured and told."),
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
    def validate_inputs(cls, **given: Any) -> bool:
        from ..wanlite_model.formats.model_card import Stated
        from ..wanlite_model.formats.pairs import check_pair
        from ..wanlite_model.formats.place import check_name
        from .comfy_bridge.save import check_target
        name, format, dtype, overwrite = (given.get(widget) for widget in ("name", "format", "dtype", "overwrite"))
        if name is not None:
            check_name(name)
        check_widgets(cls, given)
        if format is not None and dtype is not None:
            check_pair(format, dtype)
        Stated(base_model=given.get("base_model") or "", licence=given.get("licence") or "")
        if None not in (name, format, dtype):
            check_target(name, format, dtype, overwrite is None or overwrite)
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
    def validate_inputs(cls, name: str | None = None) -> bool:
        if name is not None:
            folders.found(name)
        return True

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
