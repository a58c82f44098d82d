"""The teacher from disk. A MODEL of any stock loader is as good."""
from comfy_api.latest import io

from .comfy_bridge import folders
from .report import told


class WanLiteLoadTeacher(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanLiteLoadTeacher", display_name="WanLite Load Teacher", category="WanLite",
            description="Loads a WAN 2.1 or 2.2, for text or for pictures: a .safetensors file as ComfyUI's Load Diffusion Model does, or a WAN or diffusers "
                        "folder, sharded or not. The MODEL of any other loader can be a teacher too.",
            inputs=[io.Combo.Input("name", options=folders.model_names(),
                                   tooltip="A file below models/diffusion_models, or a folder there that has a config.json (names that end "
                                           "with a slash).")],
            outputs=[io.Model.Output(display_name="model", tooltip="As Load Diffusion Model would hand it out."),
                     io.String.Output(display_name="summary", tooltip="Architecture, size, dtype and shift in words.")])

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
        from .comfy_bridge.choices import WHOLE
        from .comfy_bridge.experts import expert_note
        from .comfy_bridge.load import open_model
        from .comfy_bridge.teacher import ComfyTeacher
        path = folders.found(name)
        model = open_model(path)
        teacher = ComfyTeacher(model)
        summary = "\n".join((f"{name}: {teacher.describe()}", *teacher.notes, *expert_note(teacher.config, None, WHOLE)))
        return io.NodeOutput(model, summary, ui=told("Load Teacher", summary))
