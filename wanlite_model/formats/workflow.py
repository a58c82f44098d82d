"""A ready graph of ComfyUI's stock nodes for a saved student. It carries the shift, which no file can tell ComfyUI."""
from __future__ import annotations

from typing import Any

from ..config import WanConfig
from .card import StudentCard

# ComfyUI's own names for WAN's text encoder and VAE, as its WAN template asks for them.
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "wan_2.1_vae.safetensors"
FPS = 16                                # of WAN 2.1
POSITIVE = "A red fox walks through fresh snow in a pine forest, morning light, the camera follows it."
# Wan-Video's own default (wan/configs/shared_config.py, sample_neg_prompt; Apache-2.0): WAN was tuned with it.
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
            "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")

Source = tuple[str, int]                # (node, output slot)


def stock_workflow(unet_name: str, card: StudentCard, config: WanConfig) -> dict[str, Any] | None:
    """The graph as ComfyUI's browser saves it, for a text-to-video student; None for the other kinds, which need inputs of their own.

    unet_name: as Load Diffusion Model lists it.
    """
    if (config.in_dim, config.out_dim, config.img_emb) != (16, 16, False):
        return None
    width, height, frames = card.size
    graph = _Graph()
    graph.add("unet", "UNETLoader", (0, 0), (390, 82), {}, [("MODEL", "MODEL")], [unet_name, "default"])
    graph.add("clip", "CLIPLoader", (0, 130), (390, 106), {}, [("CLIP", "CLIP")], [TEXT_ENCODER, "wan", "default"])
    graph.add("vae", "VAELoader", (0, 290), (390, 58), {}, [("VAE", "VAE")], [VAE])
    graph.add("latent", "EmptyHunyuanLatentVideo", (0, 400), (390, 130), {}, [("LATENT", "LATENT")], [width, height, frames, 1])
    graph.add("shift", "ModelSamplingSD3", (910, 0), (315, 58), {"model": ("unet", 0)}, [("MODEL", "MODEL")], [card.shift])
    graph.add("positive", "CLIPTextEncode", (440, 0), (420, 170), {"clip": ("clip", 0)}, [("CONDITIONING", "CONDITIONING")], [POSITIVE],
              title="Positive prompt")
    graph.add("negative", "CLIPTextEncode", (440, 220), (420, 170), {"clip": ("clip", 0)}, [("CONDITIONING", "CONDITIONING")], [NEGATIVE],
              title="Negative prompt" if card.cfg != 1 else "Negative prompt (without effect at cfg 1)")
    graph.add("sampler", "KSampler", (910, 110), (315, 262),
              {"model": ("shift", 0), "positive": ("positive", 0), "negative": ("negative", 0), "latent_image": ("latent", 0)},
              [("LATENT", "LATENT")], [0, "randomize", card.steps, card.cfg, card.sampler, card.scheduler, 1.0])
    graph.add("decode", "VAEDecode", (1275, 0), (210, 46), {"samples": ("sampler", 0), "vae": ("vae", 0)}, [("IMAGE", "IMAGE")], [])
    if frames == 1:
        graph.add("save", "SaveImage", (1275, 100), (400, 400), {"images": ("decode", 0)}, [], ["wanlite"])
    else:
        graph.add("save", "SaveAnimatedWEBP", (1275, 100), (400, 460), {"images": ("decode", 0)}, [],
                  ["wanlite", float(FPS), False, 90, "default"])
    return graph.saved()


class _Graph:
    """Collects nodes and numbers their links, in the layout of workflow version 0.4."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.links: list[list[Any]] = []

    def add(self, key: str, kind: str, pos: tuple[int, int], size: tuple[int, int], inputs: dict[str, Source],
            outputs: list[tuple[str, str]], widgets: list[Any], title: str | None = None) -> None:
        number = len(self.nodes) + 1
        slots = []
        for slot, (name, (origin, origin_slot)) in enumerate(inputs.items()):
            output = self.nodes[origin]["outputs"][origin_slot]
            link = len(self.links) + 1
            self.links.append([link, self.nodes[origin]["id"], origin_slot, number, slot, output["type"]])
            output["links"].append(link)
            slots.append({"name": name, "type": output["type"], "link": link})
        self.nodes[key] = {
            "id": number, "type": kind, "pos": list(pos), "size": list(size), "flags": {}, "order": number - 1, "mode": 0,
            "inputs": slots, "outputs": [{"name": name, "type": type_, "slot_index": i, "links": []} for i, (name, type_) in enumerate(outputs)],
            **({"title": title} if title else {}), "properties": {"Node name for S&R": kind}, "widgets_values": widgets}

    def saved(self) -> dict[str, Any]:
        return {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": list(self.nodes.values()),
                "links": self.links, "groups": [], "config": {}, "extra": {}, "version": 0.4}
