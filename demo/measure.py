"""Prints what the judge, the VAE and the teacher are worth: `python -m demo.measure [judge] [teacher] [stock]`, all three by default.

judge: how often it is right on clips after the VAE's round trip, and with shuffled prompts. teacher: adherence at 30 steps
with cfg and at 4 steps without. stock: a part of the same pairs through ComfyUI's own loaders and sampler, beside ours.
"""
import argparse
import math
import random
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from wanlite_model import flow
from wanlite_model.transformer import WanLiteStudent

from . import domain, words
from .comfy_path import open_comfyui
from .vae import Vae
from .workers import Workers
from .world import BALLS, WEIGHTS, World

TEACHER, VAE = BALLS.teacher, WEIGHTS / "wan_tiny_vae.safetensors"
PAIRS = 128


def wilson(right: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927)."""
    z, share = 1.96, right / count
    centre, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)


@torch.inference_mode()
def sample(model, prompts: Sequence[str], noise: torch.Tensor, steps: int, cfg: float, world: World = BALLS) -> torch.Tensor:
    """Latents [B, C, T, H, W] in processed space, by Euler along ComfyUI's `simple` schedule; cfg 1 makes one forward a step."""
    positive, negative = (context.to(noise.device) for context in (
        words.context(list(prompts))[:, :16], words.context([world.negative])[:, :1].expand(len(prompts), -1, -1)))

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        wanted = model(x, flow.TIMESTEPS * sigma, positive)
        return wanted if cfg == 1 else flow.guided(model(x, flow.TIMESTEPS * sigma, negative), wanted, cfg)

    return flow.sample(velocity, noise, flow.schedule(steps, world.shift))


def verdicts(clips: Sequence[np.ndarray], prompts: Sequence[str], world: World = BALLS) -> list[dict[str, bool]]:
    return [world.adherence(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]


def summary(found: Sequence[dict[str, bool]]) -> str:
    """`all 0.922 [0.862, 0.957] (size 0.98, colour 1.00, ...)`"""
    right = sum(all(verdict.values()) for verdict in found)
    low, high = wilson(right, len(found))
    each = ", ".join(f"{name} {np.mean([verdict[name] for verdict in found]):.2f}" for name in found[0])
    return f"all {right / len(found):.3f} [{low:.3f}, {high:.3f}] of {len(found)} ({each})"


def measure_judge(vae: Vae, count: int = 288) -> list[str]:
    """The judge on rendered clips that training never saw, after the round trip."""
    prompts = [domain.all_prompts()[i % 144] for i in range(count)]
    clips = torch.stack([torch.from_numpy(domain.render(prompt, 2_000_000 + i)) for i, prompt in enumerate(prompts)])
    decoded = vae.decode(vae.encode(clips))
    shuffled = random.Random(1).sample(prompts, len(prompts))      # nosec B311  # the same order each time
    return [f"judge, true prompts     {summary(verdicts(decoded.numpy(), prompts))}",
            f"judge, shuffled prompts {summary(verdicts(decoded.numpy(), shuffled))}; chance is {1 / 144:.3f}",
            f"round trip              {10 * math.log10(1 / (decoded - clips).square().mean().item()):.1f} dB PSNR"]


def measure_teacher(model, vae: Vae, workers: Workers, steps: int, cfg: float, count: int = PAIRS, world: World = BALLS) -> str:
    """Adherence on the world's fixed pairs, of all and of the held-out prompts."""
    def judged(part: Sequence[tuple[str, torch.Tensor]]) -> list[dict[str, bool]]:
        prompts, noise = zip(*part, strict=True)
        return verdicts(vae.decode(sample(model, prompts, torch.stack(noise), steps, cfg, world)).numpy(), prompts, world)

    fixed = world.pairs(count)
    prompts = [prompt for prompt, _ in fixed]
    found = list(chain(*workers.map(judged, [fixed[start:start + 16] for start in range(0, count, 16)])))
    held_out = [verdict for verdict, prompt in zip(found, prompts, strict=True) if prompt in world.held_out]
    return f"{steps:2} steps, cfg {cfg:g}: {summary(found)}; held out: {summary(held_out) if held_out else 'none'}"


@torch.inference_mode()
def measure_stock(model, vae: Vae, steps: int, cfg: float, count: int = 32) -> list[str]:
    """The first pairs through ComfyUI's own model loader, sampler and VAE, and through ours."""
    prompts, noise = zip(*BALLS.pairs(count), strict=True)
    ours = sample(model, prompts, torch.stack(noise), steps, cfg)
    stock = sample_stock(prompts, noise, steps, cfg)
    difference = (stock - ours).norm() / ours.norm()
    open_comfyui()
    import comfy.latent_formats
    import comfy.sd
    import comfy.utils
    stock_vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE)))
    clips = torch.cat([stock_vae.decode(comfy.latent_formats.Wan21().process_out(latent[None])) for latent in stock])
    return [f"stock, {steps} steps, cfg {cfg:g}: {summary(verdicts(clips.numpy(), prompts))}",
            f"ours,  {steps} steps, cfg {cfg:g}: {summary(verdicts(vae.decode(ours).numpy(), prompts))}; latents differ by {difference:.1e}"]


def sample_stock(prompts: Sequence[str], noise: Sequence[torch.Tensor], steps: int, cfg: float) -> torch.Tensor:
    """Processed latents [B, C, T, H, W] as a KSampler makes them behind a ModelSamplingSD3 node."""
    open_comfyui()
    import comfy.latent_formats
    import comfy.sample
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    patcher, = ModelSamplingSD3().patch(comfy.sd.load_diffusion_model(str(TEACHER)), domain.SHIFT)
    negative = [[words.context([domain.NEGATIVE]), {}]]
    empty = torch.zeros(1, *domain.LATENT_SHAPE)
    latents = [comfy.sample.sample(patcher, start[None], steps, cfg, "euler", "simple", [[words.context([prompt]), {}]], negative,
                                   empty, disable_pbar=True) for prompt, start in zip(prompts, noise, strict=True)]
    return comfy.latent_formats.Wan21().process_in(torch.cat(latents))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["judge", "teacher", "stock"], choices=["judge", "teacher", "stock"])
    wanted = parser.parse_args().what
    vae = Vae(VAE)
    if "judge" in wanted:
        print(*measure_judge(vae), sep="\n", flush=True)
    if "teacher" in wanted or "stock" in wanted:
        model = WanLiteStudent.from_pretrained(TEACHER, torch_dtype=torch.float32)
    if "teacher" in wanted:
        with Workers() as workers:
            print("teacher,", measure_teacher(model, vae, workers, steps=30, cfg=domain.CFG), flush=True)
            print("teacher,", measure_teacher(model, vae, workers, steps=4, cfg=1.0), flush=True)
    if "stock" in wanted:
        print(*measure_stock(model, vae, steps=30, cfg=domain.CFG), sep="\n")


if __name__ == "__main__":
    main()
