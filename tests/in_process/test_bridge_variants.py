"""Every kind of WAN that is shown pictures: what its teacher answers is what ComfyUI's own sampling, through its own nodes, makes of it."""
import pytest
import torch
from helpers_bridge import relative
from helpers_tiny import random_wan

WIDTH, HEIGHT, LENGTH = 96, 64, 9
SHIFT = 8.0
KINDS = {
    "2.1 I2V": dict(model_type="i2v", in_dim=36, image_dim=1280),
    "2.1 I2V without CLIP vision": dict(model_type="i2v", in_dim=36, image_dim=1280),
    "2.1 FLF2V": dict(model_type="flf2v", in_dim=36, image_dim=1280),
    "2.2 I2V-A14B": dict(model_type="i2v", in_dim=36),
    "2.2 TI2V-5B": dict(model_type="ti2v", num_channels=48),
    "2.2 TI2V-5B without a picture": dict(model_type="ti2v", num_channels=48),
}


@pytest.fixture(scope="module")
def wide_vae(comfyui):
    """Stands for 2.2's VAE of 48 channels, a sixteenth of the size: its weights take 2.8 GB. Its latents depend on the picture."""
    class Vae:
        latent_channels = 48

        def encode(self, frames):
            small = torch.nn.functional.interpolate(frames.movedim(-1, 1), size=(frames.shape[1] // 16, frames.shape[2] // 16))
            return (small.repeat(1, 16, 1, 1)[:, :, None] * 2 - 1)[::4].transpose(0, 2)[:1] * 0.5
    return Vae()


class Seen:
    """Stands for CLIP vision, whose 1.2 GB no test can hold: features that depend on the picture."""

    def __init__(self, picture):
        generator = torch.Generator().manual_seed(int(1000 * picture.mean()))
        self.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=generator)


def stock_inputs(kind, vae, wide_vae):
    """(positive, negative, LATENT) as ComfyUI's nodes make them of two pictures."""
    from comfy_extras.nodes_wan import Wan22ImageToVideoLatent, WanFirstLastFrameToVideo, WanImageToVideo
    generator = torch.Generator().manual_seed(4)
    first, last = torch.rand(2, 1, HEIGHT, WIDTH, 3, generator=generator)
    positive, negative = ([[torch.nn.functional.pad(torch.randn(1, 5, 4096, generator=generator) * 0.3, (0, 0, 0, 507)), {"pooled_output": None}]] for _ in range(2))
    size = (WIDTH, HEIGHT, LENGTH, 1)
    if kind == "2.1 FLF2V":
        return WanFirstLastFrameToVideo.execute(positive, negative, vae, *size, first, last, Seen(first), Seen(last)).args
    if "TI2V" in kind:
        return positive, negative, Wan22ImageToVideoLatent.execute(wide_vae, *size, None if "without" in kind else first).args[0]
    return WanImageToVideo.execute(positive, negative, vae, *size, first, Seen(first) if kind == "2.1 I2V" else None).args


@pytest.fixture(params=KINDS)
def shown(request, comfyui, vae, wide_vae):
    """(kind, MODEL, our module, positive, negative, LATENT)."""
    import comfy.sd
    wan = random_wan(seed=2, depth=2, ffn_dim=256, **KINDS[request.param])
    if hasattr(wan, "img_emb"):
        assert wan.img_emb.proj[1].weight.std() > 0.01
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict({name: value.clone() for name, value in wan.state_dict().items()}, model_options={"dtype": torch.float32})
        given = stock_inputs(request.param, vae, wide_vae)
    return request.param, model, wan, *given


def by_stock_sampling(model, noise, positive, negative, latent, cfg=3.0):
    """The velocity of ComfyUI's own sampler: one Euler step goes from noise to noise - v."""
    import comfy.sample
    samples, mask = latent["samples"], latent.get("noise_mask")
    with torch.inference_mode():            # as in a node
        out = comfy.sample.sample(model, noise, 1, cfg, "euler", "simple", positive, negative, samples, noise_mask=mask, seed=0, disable_pbar=True)
        return (noise - model.get_model_object("latent_format").process_in(out)).clone()


def test_the_teacher_answers_what_stock_sampling_does(shown, pack, comfy_teacher):
    kind, model, wan, positive, negative, latent = shown
    bank, at, _ = pack("nodes.comfy_bridge.text").from_conditioning(positive, negative, latent, 1)
    teacher = comfy_teacher(model)
    assert teacher.config.to_json() == wan.wan.to_json()
    shape = tuple(latent["samples"].shape[1:])
    bank = bank.fitted(teacher.config, shape)
    told = set(bank.shown[0].tensors()) if bank.shown else set()
    assert told == ({"given"} if kind == "2.2 TI2V-5B" else set() if "TI2V" in kind else {"image", "clip_fea"} if kind in ("2.1 I2V", "2.1 FLF2V") else {"image"})
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(6))
    guided = pack("wanlite_model.teacher").guided_velocity(teacher, noise, torch.ones(1), bank.cond([0]), bank.negative_cond([0]), 3.0)
    stock = by_stock_sampling(model, noise, positive, negative, latent)
    if "given" in told:             # there the sampler puts back what it was given
        assert not guided[:, :, :1].any()
        guided, stock = guided[:, :, 1:], stock[:, :, 1:]
    assert relative(guided, stock) < 2e-3                   # what is shown is kept in float16
    v = bank.cond([0]).asked(wan, noise, torch.tensor([0.6]))
    assert relative(v, teacher.velocity(noise, torch.tensor([0.6]), bank.cond([0]))) < 1e-5
    if told:                        # and it is what is shown that it answers to
        other = type(bank)(prompts=bank.prompts, contexts=bank.contexts, negative_text="", negative=bank.negative,
                           shown=tuple(type(one)(**{name: value.flip(-1) * 1.5 for name, value in one.tensors().items()}) for one in bank.shown))
        assert relative(teacher.velocity(noise, torch.tensor([0.6]), other.cond([0])), v) > 1e-2


def test_a_banks_conditioning_samples_as_the_nodes_own(shown, pack):
    kind, model, _, positive, negative, latent = shown
    bank, _, _ = pack("nodes.comfy_bridge.text").from_conditioning(positive, negative, latent, 1)
    bank.save(path := pack("nodes.comfy_bridge.folders").output_folder("prompts") / "again.safetensors")
    bank = type(bank).load(path)
    path.unlink()
    again = pack("nodes.comfy_bridge.conditions").conditioning(bank.contexts[0], bank.shown[0] if bank.shown else None)
    against = pack("nodes.comfy_bridge.conditions").conditioning(bank.negative, bank.shown[0] if bank.shown else None)
    noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(6))
    assert relative(by_stock_sampling(model, noise, again, against, latent), by_stock_sampling(model, noise, positive, negative, latent)) < 2e-3
