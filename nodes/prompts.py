"""Prompts, encoded once. Afterwards the text encoder need not be in memory, or be there at all."""
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import folders
from .report import told
from .sockets import Prompts

NOT_LINKED = object()


class WanLiteEncodePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanLiteEncodePrompts", display_name="WanLite Encode Prompts", category="WanLite", is_output_node=True,
            description="Encodes the prompts that a student is distilled on. Prompts that are in the chosen bank are not encoded again; "
                        "when all of them are, the text encoder is not even loaded.",
            inputs=[
                io.Clip.Input("clip", optional=True, lazy=True,
                              tooltip="WAN's text encoder (umt5-xxl, from CLIPLoader with type 'wan'). Asked for only when the bank lacks a prompt."),
                io.String.Input("prompts", multiline=True, default="", placeholder="one prompt a line",
                                tooltip="One prompt a line; empty lines and lines that start with # do not count. Best 24 or more that look like "
                                        "what you generate. With nothing here and no file, the whole bank is used."),
                io.Combo.Input("prompt_file", options=[folders.NONE, *folders.prompt_files()], default=folders.NONE,
                               tooltip="A .txt file of ComfyUI's input folder, or one of WanLite's own lists, read like the field above and added to it."),
                io.String.Input("template", default="{prompt}",
                                tooltip="Put around each prompt: 'ohwx style, {prompt}' adds a LoRA's trigger word to all of them. What comes from the "
                                        "bank alone is left as it is."),
                io.String.Input("negative", multiline=True, default="", placeholder="empty: the bank's, else WAN's own",
                                tooltip="The negative prompt that guidance moves away from. Empty: that of the bank; without a bank, WAN's own "
                                        "default, which the released models were tuned with."),
                io.Combo.Input("bank", options=[folders.NONE, *folders.bank_names()], default=folders.NONE,
                               tooltip="Prompts that were encoded before: saved by this node, or a bank file in ComfyUI's input folder."),
                io.String.Input("save_as", default="", placeholder="empty: not saved",
                                tooltip="Saves the prompts and their embeddings as a bank of this name (about 8 KiB a token of text)."),
                io.Int.Input("preview", default=1, min=1, max=1_000_000,
                             tooltip="Which prompt, counted from 1, goes to the positive output, for a sampler beside the distillation."),
            ],
            outputs=[Prompts.Output(display_name="prompts", tooltip="All prompts and the negative one, encoded, for the other WanLite nodes."),
                     io.Conditioning.Output(display_name="positive", tooltip="The prompt that preview names, for a stock sampler."),
                     io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, for a stock sampler.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, save_as: str | None = None, bank: str | None = None, prompt_file: str | None = None,
                        template: str | None = None) -> bool | str:
        from ..wanlite_model.errors import WanLiteError
        from ..wanlite_model.formats.place import check_name
        for name, path in ((bank, folders.bank_path), (prompt_file, folders.prompt_file)):       # not every ComfyUI checks a list's choice
            if name not in (None, folders.NONE) and not path(name).is_file():
                return f"{name} is not there any more. Press R to refresh the list, and choose again."
        if template is not None and "{prompt}" not in template:
            return f"The template {template!r} has no {{prompt}} in it. Write it where each prompt is to stand, like 'ohwx style, {{prompt}}'."
        try:
            return not save_as or bool(check_name(save_as, "a bank"))
        except WanLiteError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, prompt_file: str = folders.NONE, bank: str = folders.NONE, **_: Any) -> str:
        files = [path(name) for name, path in ((prompt_file, folders.prompt_file), (bank, folders.bank_path)) if name != folders.NONE]
        return " ".join(folders.changed(file) for file in files)

    @classmethod
    def check_lazy_status(cls, prompts: str, prompt_file: str, template: str, negative: str, bank: str, clip: Any = NOT_LINKED, **_: Any) -> list[str]:
        from ..wanlite_model.errors import WanLiteError
        from .comfy_bridge.text import Wanted
        try:
            needed = bool(Wanted.of(prompts, prompt_file, template, negative, bank).missing)
        except WanLiteError:            # execute says it, on the node
            needed = False
        return ["clip"] if needed and clip is None else []

    @classmethod
    def execute(cls, prompts: str, prompt_file: str, template: str, negative: str, bank: str, save_as: str, preview: int,
                clip: Any = None) -> io.NodeOutput:
        from .comfy_bridge.runtime import Bar, drive
        from .comfy_bridge.text import Wanted, conditioning, save_bank, too_few
        wanted = Wanted.of(prompts, prompt_file, template, negative, bank)
        wanted.check(clip, preview, save_as)
        bar = Bar(cls.hidden.unique_id)
        encoded = drive(wanted.encode(clip), lambda done: bar.show("encoding prompts", done, len(wanted.missing)))
        saved = save_bank(encoded, save_as) if save_as else ""
        report = f"{len(encoded)} prompts, {len(wanted.missing)} texts encoded now, {len(wanted.known)} known from the bank.{saved}{too_few(len(encoded))}"
        return io.NodeOutput(encoded, conditioning(encoded.contexts[preview - 1]), conditioning(encoded.negative), ui=told("Encode Prompts", report))
