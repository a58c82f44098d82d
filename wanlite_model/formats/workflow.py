"""A ready graph of ComfyUI's stock nodes for a saved student. It carries the shift, which no file can tell ComfyUI."""
from __future__ import annotations

import math
from typing import Any, NamedTuple

from .. import flow
from ..config import WanConfig
from ..roles import SIDES, Role
from .card import StudentCard

# ComfyUI's own names for what a WAN needs beside it, as its WAN templates ask for them.
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
CLIP_VISION = "clip_vision_h.safetensors"
VAE, VAE_5B = "wan_2.1_vae.safetensors", "wan2.2_vae.safetensors"
EXPERT = "wan2.2_{task}_{side}_noise_14B_fp8_scaled.safetensors"
PICTURE = "example.png"                 # comes with ComfyUI
FPS, FPS_5B = 16, 24
EXPERT_CFG, EXPERT_STEPS = 3.5, 20      # of 2.2's A14B, for an expert that nobody distilled
POSITIVE = "A red fox walks through fresh snow in a pine forest, morning light, the camera follows it."
# Wan-Video's own default (wan/configs/shared_config.py, sample_neg_prompt; Apache-2.0): WAN was tuned with it.
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
            "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")

Source = tuple[str, int]                # (node, output slot)
Inputs = dict[str, Source]

CHANNELS = {(16, 16), (36, 16), (48, 48)}          # in and out: from text, from pictures, the 5B; others need inputs of their own


class Kind(NamedTuple):
    """Of a node: its height on the canvas, and its outputs' names and types."""
    height: int
    outputs: tuple[tuple[str, str], ...] = ()


MADE_FOR_VIDEO = (("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent", "LATENT"))
KINDS = {
    "UNETLoader": Kind(82, (("MODEL", "MODEL"),)),
    "UnetLoaderGGUF": Kind(58, (("MODEL", "MODEL"),)),          # of the custom node ComfyUI-GGUF
    "CLIPLoader": Kind(106, (("CLIP", "CLIP"),)),
    "VAELoader": Kind(58, (("VAE", "VAE"),)),
    "CLIPVisionLoader": Kind(58, (("CLIP_VISION", "CLIP_VISION"),)),
    "LoadImage": Kind(314, (("IMAGE", "IMAGE"), ("MASK", "MASK"))),
    "CLIPTextEncode": Kind(170, (("CONDITIONING", "CONDITIONING"),)),
    "CLIPVisionEncode": Kind(78, (("CLIP_VISION_OUTPUT", "CLIP_VISION_OUTPUT"),)),
    "EmptyHunyuanLatentVideo": Kind(130, (("LATENT", "LATENT"),)),
    "Wan22ImageToVideoLatent": Kind(150, (("LATENT", "LATENT"),)),
    "WanImageToVideo": Kind(210, MADE_FOR_VIDEO),
    "WanFirstLastFrameToVideo": Kind(250, MADE_FOR_VIDEO),
    "ModelSamplingSD3": Kind(58, (("MODEL", "MODEL"),)),
    "KSampler": Kind(262, (("LATENT", "LATENT"),)),
    "KSamplerAdvanced": Kind(334, (("LATENT", "LATENT"),)),
    "VAEDecode": Kind(46, (("IMAGE", "IMAGE"),)),
    "SaveImage": Kind(400),
    "SaveAnimatedWEBP": Kind(460),
}
LOADERS, PROMPTS, SAMPLING, RESULT = (0, 390), (440, 420), (910, 315), (1275, 400)         # columns: where, and how wide
GAP, BYPASSED = 50, 4


def stock_workflow(unet_name: str, card: StudentCard, config: WanConfig) -> dict[str, Any] | None:
    """The graph as ComfyUI's browser saves it; None for a WAN of channels that no stock node makes a latent for.

    unet_name: as Load Diffusion Model lists it; of a GGUF, as ComfyUI-GGUF's loader does, which is then in its place. Of one of 2.2's two experts,
    the other is loaded and sampled too, as released.
    """
    if (config.in_dim, config.out_dim) not in CHANNELS or (config.img_emb and config.in_dim != 36):
        return None
    graph, five_b = _Graph(), config.out_dim == 48
    models = _models(graph, unet_name, card, config)
    graph.add("clip", "CLIPLoader", LOADERS, {}, [TEXT_ENCODER, "wan", "default"])
    graph.add("vae", "VAELoader", LOADERS, {}, [VAE_5B if five_b else VAE])
    guided = card.cfg != 1 or card.expert
    graph.add("positive", "CLIPTextEncode", PROMPTS, {"clip": ("clip", 0)}, [POSITIVE], title="Positive prompt")
    graph.add("negative", "CLIPTextEncode", PROMPTS, {"clip": ("clip", 0)}, [NEGATIVE],
              title="Negative prompt" if guided else "Negative prompt (without effect at cfg 1)")
    asked = _asked_with_pictures(graph, card, config) if config.in_dim == 36 else _asked(graph, card, five_b)
    samples = _sampled(graph, models, asked, card)
    graph.add("decode", "VAEDecode", RESULT, {"samples": samples, "vae": ("vae", 0)}, [])
    if card.size[2] == 1:
        graph.add("save", "SaveImage", RESULT, {"images": ("decode", 0)}, ["wanlite"])
    else:
        fps = float(FPS_5B if five_b else FPS)
        graph.add("save", "SaveAnimatedWEBP", RESULT, {"images": ("decode", 0)}, ["wanlite", fps, False, 90, "default"])
    return graph.saved()


def _models(graph: _Graph, unet_name: str, card: StudentCard, config: WanConfig) -> list[Source]:
    """The student, or the high-noise expert and the low-noise one, with the shift."""
    files = {"student": unet_name}
    if card.expert:
        task = "i2v" if config.in_dim == 36 else "t2v"
        files = {side: unet_name if side == card.expert else EXPERT.format(task=task, side=side) for side in SIDES}
    for name, file in files.items():
        kind, widgets = ("UnetLoaderGGUF", [file]) if file.endswith(".gguf") else ("UNETLoader", [file, "default"])
        graph.add(f"unet {name}", kind, LOADERS, {}, widgets, title=f"WAN for {name} noise" if card.expert else None)
        graph.add(f"shift {name}", "ModelSamplingSD3", SAMPLING, {"model": (f"unet {name}", 0)}, [card.shift])
    return [(f"shift {name}", 0) for name in files]


def _asked(graph: _Graph, card: StudentCard, five_b: bool) -> Inputs:
    """Prompts and an empty latent; the 5B's may have a picture in its first frame, which is off until somebody wants it."""
    if five_b:
        graph.add("first", "LoadImage", LOADERS, {}, [PICTURE, "image"], title="First frame (off: Ctrl+B turns it on)", mode=BYPASSED)
        graph.add("latent", "Wan22ImageToVideoLatent", PROMPTS, {"vae": ("vae", 0), "start_image": ("first", 0)}, [*card.size, 1])
    else:
        graph.add("latent", "EmptyHunyuanLatentVideo", LOADERS, {}, [*card.size, 1])
    return {"positive": ("positive", 0), "negative": ("negative", 0), "latent_image": ("latent", 0)}


def _asked_with_pictures(graph: _Graph, card: StudentCard, config: WanConfig) -> Inputs:
    """Prompts, a latent, and the first frame, or the first and the last: as latents, and as CLIP tokens where the WAN reads them."""
    two = config.model_type == "flf2v"
    inputs = {"positive": ("positive", 0), "negative": ("negative", 0), "vae": ("vae", 0)}
    if config.img_emb:
        graph.add("clip vision", "CLIPVisionLoader", LOADERS, {}, [CLIP_VISION])
    for place, frame in {"first": "start", "last": "end"}.items() if two else [("first", "start")]:
        graph.add(place, "LoadImage", LOADERS, {}, [PICTURE, "image"], title=f"{place.capitalize()} frame")
        if config.img_emb:
            graph.add(f"{place} seen", "CLIPVisionEncode", PROMPTS, {"clip_vision": ("clip vision", 0), "image": (place, 0)}, ["none"])
            inputs[f"clip_vision_{frame}_image" if two else "clip_vision_output"] = (f"{place} seen", 0)
        inputs[f"{frame}_image"] = (place, 0)
    graph.add("video", "WanFirstLastFrameToVideo" if two else "WanImageToVideo", PROMPTS, inputs, [*card.size, 1])
    return {"positive": ("video", 0), "negative": ("video", 1), "latent_image": ("video", 2)}


def _sampled(graph: _Graph, models: list[Source], asked: Inputs, card: StudentCard) -> Source:
    """The latent that is sampled: by the student, or, where that is one of two, by the high-noise expert and then by the low-noise one.

    The other is as released, not distilled: it takes guidance, and a multiple of the student's steps, among which is the sigma of the hand-over.
    """
    if not card.expert:
        graph.add("sampler", "KSampler", SAMPLING, {"model": models[0], **asked},
                  [0, "randomize", card.steps, card.cfg, card.sampler, card.scheduler, 1.0])
        return ("sampler", 0)
    above = len(Role(side="high", boundary=card.boundary).turns(flow.schedule(card.steps, card.shift)))
    handed_over = max(1, min(card.steps - 1, above))
    for side, model in zip(SIDES, models):
        ours, high = side == card.expert, side == "high"
        times = 1 if ours else math.ceil(EXPERT_STEPS / card.steps)
        cfg = EXPERT_CFG if card.cfg == 1 and not ours else card.cfg
        start, end = (0, handed_over * times) if high else (handed_over * times, 10000)
        graph.add(side, "KSamplerAdvanced", SAMPLING, {"model": model, **asked},
                  ["enable" if high else "disable", 0, "randomize" if high else "fixed", card.steps * times, cfg,
                   card.sampler if ours else "euler", card.scheduler, start, end, "enable" if high else "disable"],
                  title=f"KSampler for {side} noise")
        asked = {**asked, "latent_image": (side, 0)}
    return ("low", 0)


class _Graph:
    """Collects nodes, places each below the last of its column and numbers their links, in the layout of workflow version 0.4."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.links: list[list[Any]] = []
        self.used: dict[tuple[int, int], int] = {}          # height of each column

    def add(self, key: str, kind: str, column: tuple[int, int], inputs: Inputs, widgets: list[Any], title: str | None = None,
            mode: int = 0) -> None:
        number, (x, width), y = len(self.nodes) + 1, column, self.used.get(column, 0)
        height, outputs = KINDS[kind]
        self.used[column] = y + height + GAP
        slots = []
        for slot, (name, (origin, origin_slot)) in enumerate(inputs.items()):
            output = self.nodes[origin]["outputs"][origin_slot]
            link = len(self.links) + 1
            self.links.append([link, self.nodes[origin]["id"], origin_slot, number, slot, output["type"]])
            output["links"].append(link)
            slots.append({"name": name, "type": output["type"], "link": link})
        self.nodes[key] = {
            "id": number, "type": kind, "pos": [x, y], "size": [width, height], "flags": {}, "order": number - 1, "mode": mode,
            "inputs": slots, "outputs": [{"name": name, "type": type_, "slot_index": i, "links": []} for i, (name, type_) in enumerate(outputs)],
            **({"title": title} if title else {}), "properties": {"Node name for S&R": kind}, "widgets_values": widgets}

    def saved(self) -> dict[str, Any]:
        return {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": list(self.nodes.values()),
                "links": self.links, "groups": [], "config": {}, "extra": {}, "version": 0.4}
