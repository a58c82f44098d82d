"""The workflow saved with a student that reads pictures, run by stock nodes: what it samples is what our module and our flow sample."""
import json
from dataclasses import replace

import pytest
import torch
from helpers_bridge import relative
from helpers_graph import run_here
from helpers_tiny import random_wan
from helpers_variants import TINY
from PIL import Image

from wanlite_model import flow
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.workflow import EXPERT, EXPERT_CFG, PICTURE, POSITIVE, stock_workflow
from wanlite_model.formats.write import write_student

CARD = StudentCard(steps=3, cfg=1.0, shift=5.0, size=(64, 96, 9))
SEED = 7


@pytest.fixture(scope="module")
def clip_vision(comfyui, tmp_path_factory):
    """A stock CLIP vision model as WAN's, with random weights and two layers."""
    import comfy.clip_vision
    path = tmp_path_factory.mktemp("clip") / "config.json"
    path.write_text(json.dumps({"hidden_act": "gelu", "hidden_size": 1280, "image_size": 224, "intermediate_size": 64, "layer_norm_eps": 1e-5,
                                "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 2,
                                "patch_size": 14, "projection_dim": 8}))
    return filled(comfy.clip_vision.ClipVisionModel(path))


@pytest.fixture(scope="module")
def vae_5b(comfyui):
    """A stock VAE of the 5B with random weights, 8 channels wide: the loader builds it at the released width alone."""
    import comfy.ldm.wan.vae2_2
    import comfy.sd
    released = comfy.ldm.wan.vae2_2.WanVAE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.ldm.wan.vae2_2, "WanVAE", lambda **fields: released(**{**fields, "dim": 8, "dec_dim": 8}))
        state = released(dim=8, dec_dim=8, z_dim=48, temperal_downsample=[False, True, True]).state_dict()
        vae = comfy.sd.VAE(sd=state)
    filled(vae.first_stage_model)
    return vae


def filled(holder):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in getattr(holder, "model", holder).named_parameters():
            if parameter.ndim > 1 and not name.endswith("gamma"):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith(("gamma", "norm1.weight", "norm2.weight", "layernorm.weight", "layrnorm.weight")) else 0.0)
    return holder


@pytest.fixture(scope="module")
def context():
    text = torch.zeros(1, 512, 4096)
    text[:, :5] = torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(3)) * 0.3
    return text


@pytest.fixture(scope="module")
def run_stock(comfyui, vae, vae_5b, clip_vision, context):
    """What each node of a saved workflow gives, with tiny models and a prompt in place of those that are not here."""
    from comfy_extras import nodes_hunyuan, nodes_model_advanced, nodes_wan
    classes = {**comfyui.nodes.NODE_CLASS_MAPPINGS, "ModelSamplingSD3": nodes_model_advanced.ModelSamplingSD3,
               "EmptyHunyuanLatentVideo": nodes_hunyuan.EmptyHunyuanLatentVideo,
               **{name: getattr(nodes_wan, name) for name in ("WanImageToVideo", "WanFirstLastFrameToVideo", "Wan22ImageToVideoLatent")}}
    stand_ins = {"CLIPLoader": lambda **_: (None,), "CLIPVisionLoader": lambda **_: (clip_vision,),
                 "CLIPTextEncode": lambda text, clip: ([[context if text == POSITIVE else torch.zeros_like(context), {}]],),
                 "VAELoader": lambda vae_name: (vae_5b if "2.2" in vae_name else vae,)}
    Image.radial_gradient("L").convert("RGB").resize((80, 60)).save(comfyui.base / "input" / PICTURE)

    def run(workflow):
        assert workflow["nodes"].pop()["type"] == "SaveAnimatedWEBP"        # whose module starts a server
        for node in workflow["nodes"]:
            values = node["widgets_values"]
            node["widgets_values"] = [SEED if following == "randomize" else value for value, following in zip(values, [*values[1:], None])]
        return run_here(workflow, classes, stand_ins)
    return run


@pytest.fixture
def save(comfyui, tmp_path):
    """save(student, name): the report of a file that Load Diffusion Model lists, with its workflow; gone after the test."""
    files = []

    def save(student, name):
        report = write_student(comfyui.base / "models" / "diffusion_models" / name, config=student.wan, tensors=student.state_dict().items(), card=CARD,
                               layout="single file", workflow_folder=tmp_path)
        files.append(report.file)
        return report
    yield save
    for file in files:
        file.unlink()


@pytest.fixture
def sampled(run_stock, save):
    """sampled(kind): the student, and what each node of its saved workflow gave. switched_on: nodes that are saved asleep are woken first."""
    def run(kind, switched_on=False):
        student = random_wan(seed=5, **TINY[kind])
        workflow = json.loads(save(student, f"{kind}.safetensors").workflow.read_text(encoding="utf-8"))
        for node in workflow["nodes"]:
            node["mode"] = 0 if switched_on else node["mode"]
        return student, run_stock(workflow)
    return run


def by_flow(velocity_of, shape):
    """What Euler's method makes of this velocity, from the noise that ComfyUI draws."""
    noise = torch.randn(shape, generator=torch.manual_seed(SEED))
    with torch.no_grad():
        return flow.sample(velocity_of, noise, flow.schedule(CARD.steps, CARD.shift))


@pytest.mark.parametrize("kind", ["i2v 2.1", "flf2v", "i2v 2.2"])
def test_a_wan_with_pictures_is_sampled_as_our_module_is(sampled, context, kind):
    import comfy.latent_formats
    student, ran = sampled(kind)
    [[positive, _, _]] = ran["WanFirstLastFrameToVideo" if kind == "flf2v" else "WanImageToVideo"]
    conditions, [[found]] = positive[0][1], ran["KSampler"]
    latents = comfy.latent_formats.Wan21()
    mask = (1 - conditions["concat_mask"]).expand(1, 4, *found["samples"].shape[2:])                # 1 where a picture is given
    beside = torch.cat((mask, latents.process_in(conditions["concat_latent_image"])), dim=1)        # [1, 20, T, H, W]
    seen = [output[0].penultimate_hidden_states for output in ran.get("CLIPVisionEncode", [])]
    clip = torch.cat(seen, dim=1) if seen else None
    assert mask[:, :, 0].all() and mask[:, :, -1].any() == (kind == "flf2v")
    assert (None if clip is None else clip.shape[1]) == {"i2v 2.1": 257, "flf2v": 514, "i2v 2.2": None}[kind]
    ours = by_flow(lambda x, sigma: student(torch.cat((x, beside), dim=1), flow.TIMESTEPS * sigma, context, clip), found["samples"].shape)
    assert relative(latents.process_in(found["samples"]), ours) <= 1e-4
    assert ran["VAEDecode"][0][0].shape == (9, 96, 64, 3)


def test_the_5b_is_sampled_from_text_alone_as_our_module_is(sampled, context):
    import comfy.latent_formats
    student, ran = sampled("ti2v")
    [[found]] = ran["KSampler"]
    ours = by_flow(lambda x, sigma: student(x, flow.TIMESTEPS * sigma, context), found["samples"].shape)
    assert "LoadImage" not in ran and relative(comfy.latent_formats.Wan22().process_in(found["samples"]), ours) <= 1e-4
    assert ran["VAEDecode"][0][0].shape == (9, 96, 64, 3)


def test_the_5bs_picture_stays_in_the_first_frame_whose_timestep_is_0(sampled, context):
    import comfy.latent_formats
    student, ran = sampled("ti2v", switched_on=True)
    [[found]], [[given]] = ran["KSampler"], ran["Wan22ImageToVideoLatent"]
    latents = comfy.latent_formats.Wan22()
    picture = latents.process_in(given["samples"])[:, :, :1]

    def velocity(x, sigma):
        t = torch.cat((torch.zeros(1, 1), (flow.TIMESTEPS * sigma).expand(1, x.shape[2] - 1)), dim=1)         # [1, T]
        return student(torch.cat((picture, x[:, :, 1:]), dim=2), t, context)

    ours, samples = by_flow(velocity, found["samples"].shape), latents.process_in(found["samples"])
    assert relative(samples[:, :, 1:], ours[:, :, 1:]) <= 1e-4
    assert relative(samples[:, :, :1], picture) <= 1e-4


@pytest.mark.parametrize("side", ["high", "low"])
def test_an_expert_and_the_released_one_share_the_way_from_noise_to_a_video(run_stock, save, context, side):
    """The student in its few steps at cfg 1, the other in more of them with guidance; the low-noise one goes on at the very sigma it is left at."""
    import comfy.latent_formats
    student, other = random_wan(seed=5, **TINY["t2v"]), random_wan(seed=6, **TINY["t2v"])
    save(other, EXPERT.format(task="t2v", side="low" if side == "high" else "high"))
    name = save(student, "expert.safetensors").file.name
    ran = run_stock(stock_workflow(name, replace(CARD, expert=side, boundary=0.875), student.wan))
    [found] = ran["KSamplerAdvanced"][-1]

    def released(x, sigma):
        negative, positive = (other(x, flow.TIMESTEPS * sigma, text) for text in (torch.zeros_like(context), context))
        return flow.guided(negative, positive, EXPERT_CFG)

    def ours(x, sigma):
        return student(x, flow.TIMESTEPS * sigma, context)

    own, fine = flow.schedule(3, CARD.shift), flow.schedule(21, CARD.shift)
    assert own[2] == fine[14] < 0.875 < own[1]          # where they hand over: after the steps that begin above the boundary
    high, low = ((ours, own[:3]), (released, fine[14:])) if side == "high" else ((released, fine[:15]), (ours, own[2:]))
    x = torch.randn(found["samples"].shape, generator=torch.manual_seed(SEED))
    with torch.no_grad():
        for velocity, sigmas in (high, low):
            x = flow.sample(velocity, x, sigmas)
    assert relative(comfy.latent_formats.Wan21().process_in(found["samples"]), x) <= 1e-4
