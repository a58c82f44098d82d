"""The command that rebuilds the demo's weights, in miniature: what it writes opens as the shipped weights do, and a second call goes on."""
import functools

import torch

from demo import domain, train, train_teacher, train_vae
from demo.train_vae import Stage
from demo.vae import Vae
from wanlite_model.transformer import WanLiteStudent


def test_weights_are_rebuilt_from_nothing_and_a_second_call_goes_on(comfyui, tmp_path, monkeypatch):
    for name, value in (("WORK", tmp_path / "work"), ("WEIGHTS", tmp_path), ("TEACHER", tmp_path / "teacher.safetensors"),
                        ("VAE", tmp_path / "vae.safetensors")):
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train_vae, "STAGES", (Stage(1, 2, 1, 32, 1e-3), Stage(1, 1, 9, 32, 1e-3)))
    monkeypatch.setattr(train_vae, "_CLIPS", 4)
    whole, step, made = train_teacher.Recipe, train_teacher._train_step, []
    # Most steps only count: a checkpoint is written every 250.
    monkeypatch.setattr(train_teacher, "_train_step", lambda *a: made.append(1) or (step(*a) if len(made) in (1, 251) else 0.0))
    for steps in (250, 251):
        monkeypatch.setattr(train_teacher, "Recipe", functools.partial(whole, steps=steps, clips_per_prompt=1, batch=1))
        train.main()
    assert len(made) == 251                         # the second call made one step
    teacher = WanLiteStudent.from_pretrained(tmp_path / "teacher.safetensors")
    assert (teacher.wan.num_layers, teacher.wan.dim) == (12, 128) and next(teacher.parameters()).dtype == torch.bfloat16
    clip = torch.from_numpy(domain.render(domain.all_prompts()[0], 0))[None]
    vae = Vae(tmp_path / "vae.safetensors")
    latents = vae.encode(clip)
    assert latents.shape[1:] == domain.LATENT_SHAPE and vae.decode(latents).shape == clip.shape
