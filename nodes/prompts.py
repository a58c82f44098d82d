"""Prompts and pictures, encoded once. Afterwards the encoders need not be in memory, or be there at all."""
from typing import Any

from comfy_api.latest import io

from .comfy_bridge import folders
from .report import told
from .sockets import Prompts
from .widgets import check_widgets

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
                                tooltip="One prompt a line, best 24 or more that look like what you generate; empty lines and lines that start with # do not "
                                        "count. With nothing here and no file, the whole bank is used."),
                io.Combo.Input("prompt_file", options=[folders.NONE, *folders.prompt_files()], default=folders.NONE,
                               tooltip="A .txt file of ComfyUI's input folder, or one of WanLite's own lists, read like the field above and added to it."),
                io.String.Input("negative", multiline=True, default="", placeholder="empty: the bank's, else WAN's own",
                                tooltip="The negative prompt that guidance moves away from. Empty: that of the bank; without a bank, WAN's own default, "
                                        "which the released models were tuned with."),
                io.String.Input("template", default="{prompt}",
                                tooltip="Text around each prompt, which stands where the braces are: write a LoRA's trigger word before it, for instance. "
                                        "What comes from the bank alone is left as it is."),
                io.Combo.Input("folder", options=[folders.NONE, *folders.picture_folders()], default=folders.NONE,
                               tooltip="A folder of ComfyUI's input folder with pictures, or clips, and a .txt of the same name to each, its prompt. Needs "
                                       "the VAE and the LATENT, unless only the captions are wanted."),
                io.Combo.Input("show", options=list(folders.SHOW), default=folders.FIRST,
                               tooltip="What of the folder an image-to-video WAN is shown: the picture or the clip's first frame; with FLF2V its last frame "
                                       "too (or the picture named _last); nothing, for text-to-video."),
                io.Combo.Input("bank", options=[folders.NONE, *folders.bank_names()], default=folders.NONE,
                               tooltip="Prompts that were encoded before: saved by this node, or a bank file in ComfyUI's input folder."),
                io.String.Input("save_as", default="", placeholder="empty: not saved",
                                tooltip="Saves prompts and embeddings as a bank of this name: about 8 KiB a token of text, and some MB a picture (5 at 832 x "
                                        "480 and 81 frames)."),
                io.Int.Input("preview", default=1, min=1, max=10_000,
                             tooltip="Number of the prompt, counted from 1, that goes to the positive output, for a sampler beside the distillation."),
                io.Vae.Input("vae", optional=True, tooltip="This WAN's own VAE, for a folder of pictures or clips."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="clip_vision_h, for 2.1's image-to-video and FLF2V; 2.2 has no use for it."),
                io.Latent.Input("latent", optional=True,
                                tooltip="The size and length to distil at, which pictures are encoded for. That of Wan22ImageToVideoLatent with a start "
                                        "image keeps its first frames for 2.2 TI2V-5B."),
                io.Conditioning.Input("conditioning", optional=True,
                                      tooltip="Prompts that stock nodes have encoded, with WanImageToVideo's pictures or without, in place of all prompts "
                                              "above. Conditioning (Combine) puts several into one."),
                io.Conditioning.Input("negative_conditioning", optional=True, tooltip="The negative prompt that belongs to them, from the same node."),
            ],
            outputs=[Prompts.Output(display_name="prompts", tooltip="All prompts and the negative one, encoded, for the other WanLite nodes."),
                     io.Conditioning.Output(display_name="positive", tooltip="The prompt that preview names, for a stock sampler."),
                     io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, for a stock sampler."),
                     io.Latent.Output(display_name="latent", tooltip="The LATENT to distil at: with the folder's clips in it as training data (with "
                                                                     "pictures, where it is one frame long), else as it came.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool:
        from ..wanlite_model.errors import WanLiteError
        from ..wanlite_model.formats.place import check_name
        for name, path in (("bank", folders.bank_path), ("prompt_file", folders.prompt_file), ("folder", folders.picture_folder)):
            chosen = given.get(name)
            if chosen not in (None, folders.NONE) and not path(chosen).exists():
                raise WanLiteError(f"{chosen} is not there any more.", "", "Press R to refresh the list, and choose again.")
        check_widgets(cls, given)
        if given.get("template") is not None and "{prompt}" not in given["template"]:
            raise WanLiteError(f"The template {given['template']!r} has no {{prompt}} in it.", "",
                               "Write it where each prompt is to stand, like 'ohwx style, {prompt}'.")
        if given.get("save_as"):
            check_name(given["save_as"], "a bank")
        _check_prompts(given)
        return True

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


def _check_prompts(given: dict[str, Any]) -> None:
    """Raises WanLiteError where what is typed and chosen is refused whatever the links bring; nothing, where a text is linked that is not known yet."""
    from ..wanlite_model.errors import WanLiteError
    from .comfy_bridge.text import check_alone, check_asked
    typed = {name: given.get(name) for name in ("prompts", "prompt_file", "template", "negative", "bank", "folder", "show")}
    if "conditioning" in given and "negative_conditioning" not in given:
        raise WanLiteError("The positive CONDITIONING is connected, and the negative one is not.", "", "Connect both, from the same node.")
    if "conditioning" in given:
        check_alone(typed["prompts"] or "", *(typed[name] or folders.NONE for name in ("prompt_file", "bank", "folder")))
    elif None not in typed.values():
        check_asked(**typed, preview=given.get("preview") or 1, save_as=given.get("save_as") or "", linked=given.keys())
