"""The shipped teacher and VAE do what the demo's numbers rest on, in ComfyUI's own loaders."""
import random

import pytest
import torch
from safetensors import safe_open

from demo import domain
from demo.measure import TEACHER, VAE, sample, sample_stock, verdicts
from demo.world import BALLS
from wanlite_model.transformer import WanLiteStudent


@pytest.fixture(scope="module")
def teacher() -> WanLiteStudent:
    return WanLiteStudent.from_pretrained(TEACHER, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def vae(comfyui):
    from demo.vae import Vae
    return Vae(VAE)


def share(found: list[dict[str, bool]]) -> float:
    return sum(all(verdict.values()) for verdict in found) / len(found)


def test_the_weights_are_small_and_stored_in_bf16():
    assert TEACHER.stat().st_size + VAE.stat().st_size <= 12e6
    for path in (TEACHER, VAE):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}


def test_the_judge_reads_clips_after_the_stock_vae(comfyui, vae):
    import comfy.sd
    import comfy.utils
    stock = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE)))
    prompts = random.Random(3).sample(domain.all_prompts(), 24)
    clips = torch.stack([torch.from_numpy(domain.render(prompt, 3_000_000 + i)) for i, prompt in enumerate(prompts)])
    with torch.inference_mode():
        decoded = torch.cat([stock.decode(stock.encode(clip)) for clip in clips])
    assert share(verdicts(decoded.numpy(), prompts)) >= 0.95
    torch.testing.assert_close(vae.decode(vae.encode(clips[:2])), decoded[:2], atol=1e-4, rtol=0)


def test_the_stock_sampler_and_ours_agree(comfyui, teacher):
    prompts, noise = zip(*BALLS.pairs(2), strict=True)
    with torch.inference_mode():
        stock = sample_stock(prompts, noise, steps=4, cfg=domain.CFG)
    ours = sample(teacher, prompts, torch.stack(noise), steps=4, cfg=domain.CFG)
    assert (stock - ours).norm() / ours.norm() < 1e-4


def test_the_teacher_obeys_prompts_and_needs_guidance(teacher, vae):
    prompts, noise = zip(*BALLS.pairs(24), strict=True)
    guided, plain = (share(verdicts(vae.decode(sample(teacher, prompts, torch.stack(noise), steps, cfg)).numpy(), prompts))
                     for steps, cfg in ((10, domain.CFG), (4, 1.0)))
    assert guided >= 0.8
    assert plain <= guided - 0.15
