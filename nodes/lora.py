"""LoRAs that exist already, for students with other blocks than the model they were made for."""
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import folders
from .report import told
from .sockets import Student


class WanLiteRemapLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanLiteRemapLoRA", display_name="WanLite Remap LoRA", category="WanLite", is_output_node=True,
            description="Makes LoRAs that were trained for the teacher fit a student with fewer blocks or FFN neurons, as new files in models/loras. "
                        "Without this they load without complaint and change the wrong blocks.",
            inputs=[
                Student.Input("student", tooltip="The student that the LoRAs are for: from WanLite Load Student, Distill or Create Student."),
                io.Combo.Input("lora", options=folders.lora_names(), tooltip="A LoRA that was made for the student's teacher. It is not changed."),
                io.String.Input("more", default="", multiline=True, placeholder="wan/style*.safetensors",
                                tooltip="More of them: one name a line as the list above shows it, or a pattern with * in it. What a pattern finds and is "
                                        "for another model is left out and named in the report."),
                io.String.Input("suffix", default="-wanlite", tooltip="What the new files are called: the old name, and this. With several students, name "
                                                                      "the student here."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a LoRA of the new name. What WanLite did not write is never replaced."),
            ],
            outputs=[io.String.Output(display_name="file_names", tooltip="The new LoRAs as ComfyUI's LoRA loader lists them, one a line."),
                     io.String.Output(display_name="report", tooltip="How much of each LoRA the student has, and whether ComfyUI's own loader agreed. "
                                                                     "Strength is the sum of the squares of all that a LoRA adds.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool:
        from ..wanlite_model.formats.place import check_name
        from .comfy_bridge.loras import check_targets
        lora, suffix, overwrite = (given.get(name) for name in ("lora", "suffix", "overwrite"))
        if lora is not None:
            folders.lora_path(lora)
        if suffix is None:
            return True
        check_name(f"a{suffix}", "a LoRA")
        chosen = folders.chosen_loras(lora or "", given.get("more") or "", suffix)
        check_targets({name: found for name, found in chosen.items() if name}, suffix, overwrite is None or overwrite)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora: str, more: str | None, suffix: str | None, **_: Any) -> str:
        from ..wanlite_model.errors import WanLiteError
        known = more if more and suffix is not None else ""             # ComfyUI does not tell what is linked, which is a part of its key itself
        try:
            return " ".join(f"{name} {folders.changed(folders.lora_path(name))}" for name in folders.chosen_loras(lora, known, suffix or ""))
        except WanLiteError as error:
            return str(error)

    @classmethod
    def execute(cls, student: Any, lora: str, more: str, suffix: str, overwrite: bool) -> io.NodeOutput:
        from .comfy_bridge.loras import remap
        from .comfy_bridge.runtime import Bar, drive
        bar = Bar(cls.hidden.unique_id)
        names, report = drive(remap(student, folders.chosen_loras(lora, more, suffix), suffix=suffix, overwrite=overwrite),
                              lambda event: bar.show(event.stage, event.done, event.total))
        return io.NodeOutput("\n".join(names), report, ui=told("Remap LoRA", report))
