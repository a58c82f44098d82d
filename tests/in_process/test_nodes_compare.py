"""Compare: same noise, ComfyUI's own sampling, and numbers that are measured."""
import pytest
import torch
from helpers_bridge import call, empty_latent, lora
from helpers_tiny import random_bank


@pytest.fixture
def compare(model, vae, pack):
    def compared(**given):
        settings = {"teacher_steps": 2, "student_steps": 2, "teacher_cfg": 1.0, "student_cfg": 1.0, "third_steps": 2, "third_cfg": 1.0,
                    "clips": 1, "noise_number": 0}
        return call(pack("nodes.compare").WanLiteCompare, **{"teacher": model, "student": model, "prompts": random_bank(2), "vae": vae,
                                                             "latent": empty_latent(32, 32, 5), **settings, **given})
    return compared


def halves(images):
    """The pictures of both MODELs, without the line of text above them."""
    return images[:, 28:, :32], images[:, 28:, 36:]


def test_equal_models_draw_equal_clips(compare):
    images, text, _, _, size = compare()
    left, right = halves(images)
    assert images.shape == (5, 60, 68, 3) and torch.equal(left, right) and left.std() > 0.05
    assert "equal to the teacher's" in text and size > 0


def test_steps_cfg_noise_shift_and_weights_each_change_the_clip(compare, model):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    others = ({"student": ModelSamplingSD3().patch(model, 1.0)[0]}, {"student": lora(model, 1.0)})
    for changed in ({"student_steps": 3}, {"student_cfg": 4.0}, *others):
        left, right = halves(compare(**changed)[0])
        assert not torch.equal(left, right), changed
        assert torch.isfinite(right).all()
    assert not torch.equal(compare(noise_number=1)[0], compare()[0])


def test_a_third_model_and_more_clips(compare, model):
    images, text, *_ = compare(third=lora(model, 1.0), clips=2)
    assert images.shape == (10, 60, 104, 3)
    assert text.count("M parameters") == 3 and "2 clips" in text


def test_what_is_drawn_is_what_a_stock_ksampler_draws(compare, comfyui, model, vae):
    bank = random_bank(2)
    positive, negative = ([[torch.nn.functional.pad(c, (0, 0, 0, 512 - len(c))).unsqueeze(0), {}]] for c in (bank.contexts[0], bank.negative))
    with torch.inference_mode():
        (drawn,) = comfyui.nodes.KSampler().sample(model, 7, 2, 1.0, "euler", "simple", positive, negative, empty_latent(32, 32, 5), 1.0)
        (pictures,) = comfyui.nodes.VAEDecode().decode(vae, drawn)
    assert torch.allclose(halves(compare(noise_number=7)[0])[0], pictures.clamp(0, 1), atol=1e-5)


def test_wrong_links_get_a_sentence(compare, refused):
    with refused("clips is 3 and there are 2 prompts"):
        compare(clips=3)
    with refused("4 channels"):
        compare(latent=empty_latent(channels=4))


def test_the_teachers_clips_are_kept_for_the_next_student(compare, model, comfyui, monkeypatch, pack):
    import comfy.sample
    asked, sample = [], comfy.sample.sample
    monkeypatch.setattr(comfy.sample, "sample", lambda *given, **options: asked.append(given[2]) or sample(*given, **options))
    first = compare(noise_number=90, clips=2, teacher_steps=3)
    assert asked == [1, 3, 3, 1, 2, 2] and "earlier comparison" not in first[1]
    asked.clear()
    again = compare(noise_number=90, clips=2, teacher_steps=3, student_steps=4)
    assert asked == [1, 4, 4] and "2 of the teacher's clips" in again[1]
    assert torch.equal(halves(again[0])[0], halves(first[0])[0]) and again[2] == pytest.approx(first[2], rel=1e-4)
    monkeypatch.setattr(pack("nodes.comfy_bridge.teacher"), "_never_applied", lambda model: ["A word to the wise."])
    assert "2 of the teacher's clips" in compare(noise_number=90, clips=2, teacher_steps=3, student_steps=4)[1]
    for changed in ({"teacher": lora(model, 1.0)}, {"noise_number": 91}, {"teacher_cfg": 3.0}, {"sampler": "heun"}, {"latent": empty_latent(32, 48, 5)}):
        assert "earlier comparison" not in compare(**{"noise_number": 90, "clips": 2, "teacher_steps": 3, **changed})[1], changed
    for file in (comfyui.base / "output/wanlite/cache/compare").iterdir():
        file.write_bytes(b"torn")
    assert "earlier comparison" not in compare(noise_number=90, clips=2, teacher_steps=3)[1]


def test_motion_and_sharpness_are_ratios_to_the_teachers(compare, pack, model):
    _, text, *_ = compare()
    assert "sharpness 1.00 and motion 1.00 times the teacher's" in text
    measure = pack("nodes.comfy_bridge.compare")
    clip = torch.rand(4, 8, 8, 3)
    half = clip / 2
    assert measure._ratio(measure._motion, [half], [clip]) == pytest.approx(0.5) == measure._ratio(measure._sharpness, [half], [clip])
    assert compare(latent=empty_latent(32, 32, 1))[1].count("motion") == 0
