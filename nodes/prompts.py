"""Prompts and pictures, encoded once. Afterwards the encoders need not be in memory, or be there at all."""
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
                                tooltip="Saves the prompts and their embeddings as a bank of this name: about 8 KiB a token of text, and some MB for each picture (5 at 832 x 480 and 81 frames)."),
                io.Int.Input("preview", default=1, min=1, max=1_000_000,
                             tooltip="Which prompt, counted from 1, goes to the positive output, for a sampler beside the distillation."),
                io.Combo.Input("folder", options=[folders.NONE, *folders.picture_folders()], default=folders.NONE,
                               tooltip="A folder of ComfyUI's input folder with pictures, or clips, and a .txt of the same name to each, which is its "
                                       "prompt. Needs the VAE and the LATENT below, unless only the captions are wanted."),
                io.Combo.Input("show", options=list(folders.SHOW), default=folders.FIRST,
                               tooltip="What of the folder an image-to-video WAN is shown: the picture or the clip's first frame; with FLF2V also the clip's last "
                                       "frame, or the picture of the same name with _last; or nothing, for text-to-video."),
                io.Vae.Input("vae", optional=True, tooltip="This WAN's own VAE, for a folder of pictures or clips."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="clip_vision_h, for 2.1's image-to-video and FLF2V; 2.2 has no use for it."),
                io.Latent.Input("latent", optional=True,
                                tooltip="Tells the size and length that pictures are encoded for: the one to distil at. That of Wan22ImageToVideoLatent with a "
                                        "start image keeps its first frames for 2.2 TI2V-5B."),
                io.Conditioning.Input("conditioning", optional=True,
                                      tooltip="Prompts that stock nodes have encoded, with WanImageToVideo's pictures or without: each entry is a prompt. "
                                              "Conditioning (Combine) puts several into one. In place of all prompts above."),
                io.Conditioning.Input("negative_conditioning", optional=True, tooltip="The negative prompt that belongs to them, from the same node."),
            ],
            outputs=[Prompts.Output(display_name="prompts", tooltip="All prompts and the negative one, encoded, for the other WanLite nodes."),
                     io.Conditioning.Output(display_name="positive", tooltip="The prompt that preview names, for a stock sampler."),
                     io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, for a stock sampler."),
                     io.Latent.Output(display_name="latent", tooltip="The LATENT to distil at: with the folder's clips in it as training data (with pictures, where "
                                                                     "it is one frame long), else as it came.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, save_as: str | None = None, bank: str | None = None, prompt_file: str | None = None,
                        template: str | None = None, folder: str | None = None) -> bool | str:
        from ..wanlite_model.errors import WanLiteError
        from ..wanlite_model.formats.place import check_name
        for name, path in ((bank, folders.bank_path), (prompt_file, folders.prompt_file)):       # not every ComfyUI checks a list's choice
            if name not in (None, folders.NONE) and not path(name).is_file():
                return f"{name} is not there any more. Press R to refresh the list, and choose again."
        if folder not in (None, folders.NONE) and not folders.picture_folder(folder).is_dir():
            return f"The folder {folder} is not there any more. Press R to refresh the list, and choose again."
        if template is not None and "{prompt}" not in template:
            return f"The template {template!r} has no {{prompt}} in it. Write it where each prompt is to stand, like 'ohwx style, {{prompt}}'."
        try:
            return not save_as or bool(check_name(save_as, "a bank"))
        except WanLiteError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, prompt_file: str = folders.NONE, bank: str = folders.NONE, folder: str = folders.NONE, **_: Any) -> str:
        places = ((prompt_file, folders.prompt_file), (bank, folders.bank_path), (folder, folders.picture_folder))
        files = [path(name) for name, path in places if name != folders.NONE]
        return " ".join(folders.changed(file) for file in files)

    @classmethod
    def check_lazy_status(cls, prompts: str, prompt_file: str, template: str, negative: str, bank: str, folder: str = folders.NONE,
                          show: str = folders.FIRST, clip: Any = NOT_LINKED, conditioning: Any = None, **_: Any) -> list[str]:
        from ..wanlite_model.errors import WanLiteError
        from .comfy_bridge.text import Wanted
        try:
            needed = conditioning is None and bool(Wanted.of(prompts, prompt_file, template, negative, bank, folder, show).missing)
        except WanLiteError:            # execute says it, on the node
            needed = False
        return ["clip"] if needed and clip is None else []

    @classmethod
    def execute(cls, prompts: str, prompt_file: str, template: str, negative: str, bank: str, save_as: str, preview: int, folder: str, show: str,
                clip: Any = None, vae: Any = None, clip_vision: Any = None, latent: Any = None, conditioning: Any = None,
                negative_conditioning: Any = None) -> io.NodeOutput:
        from .comfy_bridge.conditions import conditioning as stock
        from .comfy_bridge.runtime import Bar, drive
        from .comfy_bridge.text import Wanted, check_alone, encoded, from_conditioning, save_bank, too_few
        bar = Bar(cls.hidden.unique_id)
        if conditioning is None:
            wanted = Wanted.of(prompts, prompt_file, template, negative, bank, folder, show)
            wanted.check(clip, preview, save_as)
            work = encoded(wanted, clip=clip, vae=vae, clip_vision=clip_vision, latent=latent, show=show)
            gathered, at, report = drive(work, lambda told: bar.show(*told))
        else:
            check_alone(prompts, prompt_file, bank, folder)
            gathered, at, report = from_conditioning(conditioning, negative_conditioning, latent, preview)
        report += (save_bank(gathered, save_as) if save_as else "") + too_few(len(gathered))
        return io.NodeOutput(gathered, stock(gathered.contexts[preview - 1], gathered.shown[preview - 1] if gathered.shown else None),
                             stock(gathered.negative, gathered.shown[preview - 1] if gathered.shown else None), at, ui=told("Encode Prompts", report))
