"""Image-to-video and the 5B through the nodes: pictures in, a student out, saved, opened again, sampled beside its teacher."""
import pytest
import torch
from helpers_bridge import call, empty_latent, relative
from helpers_tiny import random_wan

KINDS = {"2.1 I2V": dict(model_type="i2v", in_dim=36, image_dim=1280), "2.1 FLF2V": dict(model_type="flf2v", in_dim=36, image_dim=1280),
         "2.2 I2V, one expert at every level": dict(model_type="i2v", in_dim=36), "2.2 TI2V-5B": dict(model_type="ti2v", num_channels=48)}
PROMPTS = 8


def channels(kind):
    return 48 if "5B" in kind else 16


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(comfyui, kind):
    import comfy.sd
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(dict(random_wan(seed=2, depth=4, ffn_dim=256, **KINDS[kind]).state_dict()),
                                                        model_options={"dtype": torch.float32})


@pytest.fixture
def encoded(kind, pack):
    """What Encode Prompts makes of eight prompts, each with a picture of its own."""
    generator = torch.Generator().manual_seed(0)
    latent = empty_latent(64, 64, 9, channels=channels(kind))
    positive = []
    for _ in range(PROMPTS):
        told = {"pooled_output": None}
        if "5B" not in kind:
            told |= {"concat_latent_image": torch.randn(1, 16, 3, 8, 8, generator=generator), "concat_mask": torch.ones(1, 1, 3, 8, 8).index_fill(2, torch.tensor([0]), 0)}
        if "2.1" in kind:
            told["clip_vision_output"] = type("Output", (), {"penultimate_hidden_states": torch.randn(1, 514 if "FLF" in kind else 257, 1280, generator=generator)})()
        positive.append([torch.nn.functional.pad(torch.randn(1, 5, 4096, generator=generator) * 0.3, (0, 0, 0, 507)), told])
    if "5B" in kind:
        latent = {"samples": torch.cat((torch.randn(PROMPTS, 48, 1, 8, 8, generator=generator), torch.zeros(PROMPTS, 48, 2, 8, 8)), 2),
                  "noise_mask": torch.ones(PROMPTS, 1, 3, 8, 8).index_fill(2, torch.tensor([0]), 0)}
    bank, positive, negative, at = call(pack("nodes.prompts").WanLiteEncodePrompts, conditioning=positive, latent=latent,
                                        negative_conditioning=[[torch.zeros(1, 512, 4096), {}]])
    return bank, positive, at


class Pixels:
    """Stands for both VAEs: latents as they are."""
    def __init__(self, kind):
        self.latent_channels = channels(kind)

    def decode(self, latents):
        return latents[:, :3].movedim(1, -1).sigmoid()


def test_a_student_comes_out_that_stock_nodes_sample(comfyui, kind, model, encoded, pack):
    bank, positive, latent = encoded
    expert = {"expert": "low noise, at every level"} if "2.2 I2V" in kind else {}
    start, report = call(pack("nodes.student").WanLiteCreateStudent, model=model, prompts=bank, latent=latent, preset="3/4 of the blocks", cfg=2.0,
                         method="interleaved", **expert)
    assert len(start.plan.keep) == 3
    recipe = {"learning_rate": 5e-4, "optimizer": "AdamW", "teacher_steps": 4, "batch_size": 4, "evaluations": 2, "ema_decay": 0.5, "own_states": 0.3, "renoised": 0.3}
    given = {"model": model, "prompts": bank, "latent": latent, "cfg": 2.0, "steps": 20, "recipe": recipe}
    student, trained, _, report, _ = call(pack("nodes.distill").WanLiteDistill, student=start, preset="slim", run_name=f"slim {kind}", vae=Pixels(kind),
                                              **given, **expert)
    assert student.card.measured["held_out_error"] < 0.9 * student.card.measured["plain_cut_error"], report
    file, report = call(pack("nodes.student").WanLiteSaveStudent, student=student, name=f"saved {kind}", dtype="fp32")[:2]
    assert "; verified: ComfyUI's Load Diffusion Model opened it" in report
    again, opened = call(pack("nodes.student").WanLiteLoadStudent, name=file)
    assert again.config.to_json() == student.config.to_json() and again.config.model_type == KINDS[kind]["model_type"]
    images, told, *_ = call(pack("nodes.compare").WanLiteCompare, teacher=model, student=opened, prompts=bank, vae=Pixels(kind), latent=latent,
                            teacher_steps=4, teacher_cfg=2.0, student_steps=4, clips=2, **expert)
    assert torch.isfinite(images).all() and "times as fast" in told
    x = torch.randn(1, channels(kind), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    velocities = [pack("nodes.comfy_bridge.teacher").ComfyTeacher(one).velocity(x, torch.tensor([0.7]), bank.cond([0])) for one in (trained, opened)]
    assert relative(*velocities) < 2e-2             # the run's own is in bf16


def test_few_steps_are_learnt_with_pictures(kind, model, encoded, pack):
    bank, _, latent = encoded
    expert = {"expert": "low noise, at every level"} if "2.2 I2V" in kind else {}
    start, _ = call(pack("nodes.student").WanLiteCreateStudent, model=model, prompts=bank, latent=latent, preset="same size", **expert)
    recipe = {"learning_rate": 2e-3, "batch_size": 4, "evaluations": 2, "ema_decay": 0.5, "rank": 8, "teacher_steps": 4, "student_steps": 2}
    student, *_ = call(pack("nodes.distill").WanLiteDistill, student=start, model=model, prompts=bank, latent=latent, preset="few-step 4", cfg=2.0, steps=20,
                       recipe=recipe, run_name=f"few {kind}", **expert)
    assert student.card.steps == 2 and student.card.measured["held_out_error"] < student.card.measured["plain_cut_error"]


def test_given_frames_that_the_prompts_do_not_have_are_no_small_thing(kind, model, encoded, pack, refused):
    bank, _, latent = encoded
    if "5B" not in kind:
        return
    texts = type(bank)(prompts=bank.prompts, contexts=bank.contexts, negative_text="", negative=bank.negative)
    start, _ = call(pack("nodes.student").WanLiteCreateStudent, model=model, prompts=texts, latent=latent, preset="1/2 of the blocks", method="interleaved", cfg=1.0)
    with refused("the prompts were encoded without them"):
        call(pack("nodes.distill").WanLiteDistill, student=start, model=model, prompts=texts, latent=latent, preset="slim", run_name="not told")


def test_pictures_are_asked_for_where_a_wan_is_shown_some(kind, model, encoded, pack, refused):
    bank, _, latent = encoded
    expert = {"expert": "low noise, at every level"} if "2.2 I2V" in kind else {}
    texts = type(bank)(prompts=bank.prompts, contexts=bank.contexts, negative_text="", negative=bank.negative)
    node, given = pack("nodes.student").WanLiteCreateStudent, {"model": model, "prompts": bank, "latent": latent, "preset": "1/2 of the blocks", **expert}
    larger = {"samples": torch.zeros(1, channels(kind), 3, 8, 12)}
    with refused("WAN at this size is shown"):
        call(node, **{**given, "latent": larger})
    if "5B" in kind:
        call(node, **{**given, "prompts": texts})       # it makes videos of text alone too
    else:
        with refused("makes videos of pictures, and the prompts come with none"):
            call(node, **{**given, "prompts": texts})
