"""Distill: cancel and queue again lands on the same weights, outputs go into stock nodes, wrong links are refused at once."""
import dataclasses
import json
import math

import pytest
import torch
from helpers_bridge import call, empty_latent, lora, relative, state, tree
from helpers_tiny import random_bank, random_wan
from safetensors.torch import load_file, save_file

BANK = random_bank(2)
LATENT = empty_latent(32, 32, 5)                        # [1, 16, 2, 4, 4]


@pytest.fixture
def teacher(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    return ModelSamplingSD3().patch(model, 3.0)[0]


@pytest.fixture
def recipe(pack):
    settings = {"learning_rate": 2e-3, "batch_size": 2, "warmup": 1, "teacher_steps": 2, "evaluations": 2, "ema_decay": 0.5}
    return call(pack("nodes.recipe").WanLiteRecipe, **settings)[0]


@pytest.fixture
def start(teacher, pack):
    node = pack("nodes.student").WanLiteCreateStudent
    return call(node, model=teacher, prompts=BANK, latent=LATENT, preset="1/2 of the blocks", method="interleaved", depth=0, ffn_dim=0,
                keep_map="", block_steps=0, probe_seed=0)[0]


@pytest.fixture
def distil(teacher, start, recipe, pack):
    """Distill's outputs; six steps unless told otherwise."""
    def distilled(run_name, **given):
        return call(pack("nodes.distill").WanLiteDistill, **{"student": start, "model": teacher, "prompts": BANK, "latent": LATENT, "recipe": recipe,
                                                             "steps": 6, "cfg": 3.0, "run_name": run_name, "train_seed": 0, **given})
    return distilled


def rows(comfyui, run_name):
    """The steps that the run's log tells of."""
    logs = sorted((comfyui.base / "output/wanlite/runs" / run_name).glob("*.jsonl"))
    lines = [json.loads(line) for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    return [line["step"] for line in lines if line["kind"] == "step"]


def trained(comfyui, run_name):
    """All that training changed: weights, their average, the optimizer's state after the last step."""
    return load_file(comfyui.base / "output/wanlite/runs" / run_name / "checkpoint.safetensors")


def test_outputs_go_into_stock_nodes(comfyui, distil, start, pack):
    from comfy_extras.nodes_train import LossGraphNode
    student, model, loss_map, report, chart = distil("story")
    assert student.fingerprint != start.fingerprint and student.card.cfg == 1.0 and "plain cut" in report
    assert model.get_model_object("model_sampling").shift == 3.0
    assert len(loss_map["loss"]) == 6 and all(math.isfinite(loss) for loss in loss_map["loss"])
    LossGraphNode.PREPARE_CLASS_CLONE({}).execute(loss_map, "loss")
    assert chart.ndim == 4 and chart.shape[0] == 1 and chart.shape[-1] == 3 and 0 <= chart.min() < chart.max() <= 1
    positive, negative = ([[context.unsqueeze(0), {}]] for context in (BANK.contexts[0], BANK.negative))
    with torch.inference_mode():
        (drawn,) = comfyui.nodes.KSampler().sample(model, 1, 2, 1.0, "euler", "simple", positive, negative, LATENT, 1.0)
    assert torch.isfinite(drawn["samples"]).all()


def test_a_cancelled_run_goes_on_and_lands_on_the_same_weights(comfyui, distil, pack, monkeypatch):
    """Cancel arrives between two steps, as the button sends it from another thread."""
    import comfy.model_management as management
    runtime = pack("nodes.comfy_bridge.runtime")
    shown = runtime.Bar.show

    def cancel_at_three(bar, stage, done, total):
        if (stage, done) == ("training", 3):
            management.interrupt_current_processing()
        shown(bar, stage, done, total)

    straight, *_ = distil("straight")
    with monkeypatch.context() as patched, pytest.raises(management.InterruptProcessingException):
        patched.setattr(runtime.Bar, "show", cancel_at_three)
        distil("cancelled")
    assert rows(comfyui, "cancelled") == [1, 2, 3] and not management.processing_interrupted()
    trained_steps = []

    def note(bar, stage, done, total):
        trained_steps.extend([done] if stage == "training" else [])
        shown(bar, stage, done, total)

    with monkeypatch.context() as patched:
        patched.setattr(runtime.Bar, "show", note)
        resumed, *_ = distil("cancelled")
    assert set(trained_steps) == {3, 4, 5, 6}                                             # the three that were done are not done again
    assert rows(comfyui, "cancelled") == [1, 2, 3, 4, 5, 6]
    assert straight.fingerprint == resumed.fingerprint
    one, other = trained(comfyui, "straight"), trained(comfyui, "cancelled")
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_finished_run_comes_back_from_disk_and_another_job_does_not_take_its_name(comfyui, distil, refused):
    first = distil("finished")
    before = tree(comfyui.base / "output/wanlite/runs/finished")
    again = distil("finished")
    assert again[0] == first[0] and again[2] == first[2] and again[3] == first[3]
    assert distil("finished", steps=3)[0] == first[0]               # it has as many already
    with refused("cfg=3.0, not 4.0"):
        distil("finished", cfg=4.0)
    after = tree(comfyui.base / "output/wanlite/runs/finished")
    assert {name: size for name, size in after.items() if "lock" not in name} == {n: s for n, s in before.items() if "lock" not in n}


def test_folding_guidance_in_changes_what_the_student_learns(comfyui, distil):
    folded, kept = distil("folded", steps=3), distil("kept", steps=3, preset="keep-cfg")
    assert (folded[0].card.cfg, kept[0].card.cfg) == (1.0, 3.0)
    one, other = trained(comfyui, "folded"), trained(comfyui, "kept")
    assert one.keys() == other.keys() and not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_latents_are_training_data_in_processed_space(comfyui, distil, teacher, pack):
    """What the VAE hands out is not what a WAN sees: mean and spread per channel lie between them."""
    latents = pack("nodes.comfy_bridge.latents")
    clips = {"samples": torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))}
    expected = teacher.get_model_object("latent_format").process_in(clips["samples"])
    assert torch.equal(latents.training_latents(clips, 16), expected) and not torch.equal(expected, clips["samples"])
    assert latents.training_latents(LATENT, 16) is None
    assert distil("clips", latent=clips, steps=2)[0].card.recipe["user_latents"] == 1


def test_a_vae_makes_a_clip_at_every_evaluation_and_leaves_the_device_afterwards(comfyui, distil, vae):
    import comfy.model_management
    from PIL import Image
    distil("samples", steps=2, vae=vae)
    clips = sorted((comfyui.base / "output/wanlite/runs/samples/samples").glob("*"))
    assert [clip.name for clip in clips] == ["step-1.webp", "step-2.webp"]
    for path in clips:
        with Image.open(path) as clip:
            assert clip.size == (2 * 32 + 4, 32) and clip.n_frames == 5 and len(clip.convert("RGB").getcolors(4096)) > 10
    assert all(loaded.model is not vae.patcher for loaded in comfy.model_management.current_loaded_models)


def test_sigmas_set_the_teachers_path_and_the_students_steps(distil):
    assert distil("sigmas", steps=2, sigmas=torch.tensor([1.0, 0.8, 0.4, 0.0]))[0].card.steps == 3


def test_another_guidance_scale_than_the_students_is_told_in_the_report(distil, pack):
    asked = "was made for a teacher at cfg 5; this run asked its teacher at cfg 3"
    student, _, _, report, _ = distil("other-cfg", steps=1)                               # the start was made at Create Student's default, 5
    assert asked in report
    again = distil("same-cfg", steps=1, student=student)[3]                               # its card says cfg 1: guidance is folded in
    assert "was made for a teacher at cfg" not in again


def stranger(comfyui, pack, **shape):
    """A stock WAN file that was not cut from the teacher, as Load Student hands it on."""
    path = comfyui.base / "models/diffusion_models/stranger.safetensors"
    save_file(dict(random_wan(**shape).state_dict()), path)
    return pack("wanlite_model.compress.handle").StudentHandle.of(path)


def test_another_wan_can_be_the_student(comfyui, distil, pack):
    student, model, _, report, _ = distil("stranger", student=stranger(comfyui, pack, hidden_size=256, depth=2, ffn_dim=128))
    assert student.config.dim == 256 and model.model.diffusion_model.dim == 256 and "untrained student" in report


def test_another_wan_takes_a_lora_of_its_own_and_comes_back_when_saved(comfyui, distil, pack):
    """Larger than its teacher in every way; a LoRA that it learned lies over the file that it was loaded from."""
    nodes, given = pack("nodes.student"), stranger(comfyui, pack, hidden_size=256, depth=5, ffn_dim=512)
    settings = call(pack("nodes.recipe").WanLiteRecipe, rank=4, learning_rate=2e-3, teacher_steps=2, evaluations=2)[0]
    student, *_ = distil("stranger-lora", student=given, recipe=settings, steps=10)
    name, report = call(nodes.WanLiteSaveStudent, student=student, name="stranger-lora", format="LoRA", dtype="bf16", overwrite=False)
    assert name == "stranger-lora.safetensors" and "verified: ComfyUI's LoRA loader opened it" in report
    saved, _ = call(nodes.WanLiteSaveStudent, student=student, name="stranger-whole", format="folder", dtype="bf16", overwrite=False)
    again = pack("wanlite_model.compress.handle").StudentHandle.of(comfyui.base / "models/diffusion_models/stranger-whole")
    assert again.config == student.config and again.plan.keep == (0, 1, 2, 3, 4)


def test_a_student_that_is_its_teacher_is_not_taught_what_it_knows(teacher, distil, pack, refused):
    same, _ = call(pack("nodes.student").WanLiteCreateStudent, model=teacher, prompts=BANK, latent=LATENT, preset="same size")
    for name, given in {"unguided": {"preset": "no-cfg", "cfg": 1.0}, "kept": {"preset": "keep-cfg"}}.items():
        with refused("asked for what that does already"):
            distil(name, student=same, **given)


def test_a_wan_of_other_latents_is_refused_at_once(comfyui, distil, pack, refused):
    with refused("48 channels in, 48 out"):
        distil("other-latents", student=stranger(comfyui, pack, num_channels=48, depth=2, ffn_dim=128))
    left = comfyui.base / "output/wanlite/runs/other-latents"
    assert not left.exists() or not any(left.iterdir())


def bad_links():
    return {
        "a latent of another model": ({"latent": empty_latent(channels=4)}, "4 channels"),
        "an odd size": ({"latent": empty_latent(40, 32)}, "even width and height"),
        "three clips for two prompts": ({"latent": {"samples": torch.randn(3, 16, 2, 4, 4)}}, "3 latents and 2 prompts"),
        "a masked clip": ({"latent": {"samples": torch.randn(2, 16, 2, 4, 4), "noise_mask": torch.ones(1)}}, "noise mask"),
        "sigmas of another number of steps": ({"preset": "few-step 4", "recipe": {"student_steps": 4}, "sigmas": torch.linspace(1, 0, 21)}, "SIGMAS have 20 steps"),
        "sigmas that stop halfway": ({"sigmas": torch.tensor([1.0, 0.5])}, "sigmas run from"),
    }


@pytest.mark.parametrize("what", bad_links())
def test_wrong_links_get_a_sentence_and_leave_no_run_behind(what, comfyui, distil, refused):
    given, words = bad_links()[what]
    with refused(words):
        distil("wrong", **given)
    left = comfyui.base / "output/wanlite/runs/wrong"
    assert not left.exists() or not any(left.iterdir())


def test_the_recipe_node_changes_what_was_set_and_leaves_the_preset_the_rest(pack):
    node, engine = pack("nodes.recipe").WanLiteRecipe, pack("wanlite_model.distill.job")
    assert call(node)[0] == {}
    assert call(node, learning_rate=1e-3, rank=0, renoised=0.0)[0] == {"learning_rate": 1e-3, "rank": 0, "renoised": 0.0}
    shown = {widget.id: widget for widget in node.GET_SCHEMA().inputs}
    assert tuple(shown["objective"].options[1:]) == engine.OBJECTIVES and set(shown) == {
        "start_from", "boundary", *(f.name for f in dataclasses.fields(engine.Recipe)), *(f.name for f in dataclasses.fields(engine.LeverSettings))}
    assert call(node, checkpointing="on", frozen_float8="off", swapped_blocks=0)[0] == {"checkpointing": True, "frozen_float8": False, "swapped_blocks": 0}


def test_a_finished_run_that_is_asked_for_more_goes_on(comfyui, distil):
    first = distil("longer", steps=4)
    second = distil("longer", steps=6)
    assert rows(comfyui, "longer") == [1, 2, 3, 4, 5, 6] and second[0] != first[0]


def test_levers_that_are_set_are_pulled_and_start_no_new_run(comfyui, distil, recipe, start):
    distil("levers", steps=3)
    distil("levers", steps=6, recipe={**recipe, "checkpointing": True, "optimizer_8bit": True})
    told = json.loads((comfyui.base / "output/wanlite/runs/levers/job.json").read_text(encoding="utf-8"))
    assert told["levers"]["checkpointing"] and told["levers"]["optimizer_8bit"] and rows(comfyui, "levers") == [1, 2, 3, 4, 5, 6]
    assert any(name.startswith("root.") for name in trained(comfyui, "levers"))


def test_a_job_that_fits_nowhere_is_refused_before_anything_is_asked_and_told_what_fits(comfyui, distil, recipe, refused):
    long = empty_latent(64, 64, 161)
    with refused(r"MiB of the 30 MiB that are free.*Set the LATENT's length to \d+ frames: that fits"):
        distil("too much", latent=long, recipe={**recipe, "gpu_gib": 30 / 1024})
    assert not (comfyui.base / "output/wanlite/runs/too much/checkpoint.safetensors").exists()


def test_minutes_0_prepares_a_run_that_goes_on_without_comfyui_and_comes_back(comfyui, teacher, distil, pack, monkeypatch):
    """The teacher carries a LoRA: what lies in the folder afterwards has it in its weights."""
    patched = lora(teacher, 0.5)
    start = call(pack("nodes.student").WanLiteCreateStudent, model=patched, prompts=BANK, latent=LATENT, preset="1/2 of the blocks", method="interleaved",
                 depth=0, ffn_dim=0, keep_map="", block_steps=0, probe_seed=0)[0]
    assert distil("away", model=patched, student=start, minutes=0.0) is None                # nothing goes on from it
    folder = comfyui.base / "output/wanlite/runs/away"
    assert (folder / "teacher").is_dir() and (folder / "start").is_dir() and not (folder / "metrics.jsonl").exists()
    with torch.inference_mode(False):
        assert pack("wanlite_model.cli").main(["run", str(folder), "--device", "cpu"]) == 0
    student, *_ = distil("away", model=patched, student=start, minutes=0.0)
    assert student.folder == str(folder / "student-6") and rows(comfyui, "away") == [1, 2, 3, 4, 5, 6]


def test_a_teacher_whose_file_is_there_is_named_and_not_copied(comfyui, distil, pack, student, start):
    own = {name: tensor + 0.001 for name, tensor in student.state_dict().items()}           # weights that no other file here has
    save_file(own, comfyui.base / "models/diffusion_models/the-teacher.safetensors")
    model = call(pack("nodes.teacher").WanLiteLoadTeacher, name="the-teacher.safetensors")[0]
    assert distil("named", model=model, minutes=0.0) is None
    told = json.loads((comfyui.base / "output/wanlite/runs/named/job.json").read_text(encoding="utf-8"))
    assert told["teacher"]["path"].endswith("the-teacher.safetensors") and not (comfyui.base / "output/wanlite/runs/named/teacher").exists()


def test_runs_and_answers_lie_where_extra_model_paths_puts_them(comfyui, pack, tmp_path, monkeypatch):
    import folder_paths
    folders = pack("nodes.comfy_bridge.folders")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "wanlite_cache", ([str(tmp_path)], set()))
    assert folders.output_folder("cache") == tmp_path and folders.output_folder("runs").parent.name == "wanlite"


def test_a_preset_that_makes_a_lora_ends_in_a_file_for_the_stock_lora_loader(comfyui, teacher, distil, pack, refused):
    """The MODEL that Distill hands out, the saved LoRA over the teacher, and the merged file are one and the same model."""
    make, save = pack("nodes.student").WanLiteCreateStudent, pack("nodes.student").WanLiteSaveStudent
    same, _ = call(make, model=teacher, prompts=BANK, latent=LATENT, preset="same size")
    small = call(pack("nodes.recipe").WanLiteRecipe, learning_rate=5e-3, warmup=2, rank=4, teacher_steps=2, evaluations=2)[0]
    student, model, *_ = distil("lora", student=same, preset="no-cfg", recipe=small, steps=30)
    assert student.card.steps == 2 and student.card.cfg == 1.0 and student.loras and student.same_as
    name, report = call(save, student=student, name="two-steps", format="LoRA", dtype="bf16", overwrite=False)
    assert name == "two-steps.safetensors" and "verified: ComfyUI's LoRA loader opened it" in report
    (stock,) = comfyui.nodes.LoraLoaderModelOnly().load_lora_model_only(teacher, name, 1.0)
    merged, _ = call(save, student=student, name="two-steps-merged", format="single file", dtype="fp32", overwrite=False)
    (opened,) = comfyui.nodes.UNETLoader().load_unet(merged, "default")
    wrap, (x, sigma, cond) = pack("nodes.comfy_bridge.teacher").ComfyTeacher, state()
    expected = wrap(model).velocity(x, sigma, cond)
    assert relative(wrap(stock).velocity(x, sigma, cond), expected) < 1e-4
    assert relative(wrap(opened).velocity(x, sigma, cond), expected) < 1e-3
    assert relative(wrap(teacher).velocity(x, sigma, cond), expected) > 2e-3
    assert "was there already: this very student as a LoRA in bf16" in call(save, student=student, name="two-steps", format="LoRA", dtype="bf16")[1]
    with refused("is already there"):
        call(save, student=student, name="two-steps", format="LoRA", dtype="fp16", overwrite=False)
    with refused("not a LoRA over its teacher"):
        call(save, student=distil("whole")[0], name="other", format="LoRA", dtype="bf16", overwrite=False)


def test_the_image_preset_wants_one_frame(distil, refused):
    with refused("for one frame and the LATENT has 5"):
        distil("image", preset="image")


def test_the_image_preset_ends_in_a_student_for_one_frame(comfyui, distil, pack):
    frame = empty_latent(32, 32, 1)
    student, model, _, report, _ = distil("one-frame", preset="image", latent=frame)
    assert student.card.size == (32, 32, 1) and (student.card.steps, student.card.cfg) == (8, 1.0) and not student.loras, student.card
    assert "end of a clip" in report and "The negative prompt has no effect" in report
    x = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    _, sigma, cond = state()
    assert torch.isfinite(pack("nodes.comfy_bridge.teacher").ComfyTeacher(model).velocity(x, sigma[:1], type(cond)(context=cond.context[:1]))).all()


def test_a_few_step_student_goes_on_with_distribution_matching(comfyui, teacher, distil, pack, refused):
    """Through the graph alone: same size, few steps, then the objective of WanLite Recipe; one LoRA is left, and it is another one."""
    same, _ = call(pack("nodes.student").WanLiteCreateStudent, model=teacher, prompts=BANK, latent=LATENT, preset="same size")
    node, settings = pack("nodes.recipe").WanLiteRecipe, {"rank": 2, "learning_rate": 2e-3, "teacher_steps": 4, "student_steps": 2, "evaluations": 2}
    few, *_ = distil("few", student=same, preset="few-step 4", recipe=call(node, **settings)[0], steps=4)
    sharper = call(node, objective="distribution", **settings)[0]
    student, model, _, report, _ = distil("sharper", student=few, preset="few-step 4", recipe=sharper, steps=4)
    assert "Held-out drift" in report and "LoRA as it was" in report and len(student.loras) == 1 and student.card.steps == 2
    assert student.card.measured["held_out_drift"] >= 0 and student.fingerprint != few.fingerprint
    x, sigma, cond = state()
    wrap = pack("nodes.comfy_bridge.teacher").ComfyTeacher
    assert torch.isfinite(wrap(model).velocity(x, sigma, cond)).all()
    with refused("one few-step LoRA"):
        distil("too-early", student=same, preset="few-step 4", recipe=sharper, steps=4)
    left = comfyui.base / "output/wanlite/runs/too-early"
    assert not left.exists() or not any(left.iterdir())                              # before anything was asked


def test_the_model_that_is_handed_out_carries_nothing_that_the_teacher_left_out(teacher, distil, pack):
    same, _ = call(pack("nodes.student").WanLiteCreateStudent, model=teacher, prompts=BANK, latent=LATENT, preset="same size")
    carrying = teacher.clone()
    carrying.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    settings = call(pack("nodes.recipe").WanLiteRecipe, rank=2, teacher_steps=2, evaluations=1)[0]
    _, model, _, report, _ = distil("plain", student=same, model=carrying, preset="no-cfg", recipe=settings, steps=1)
    assert "Left out of the teacher: a post-cfg function" in report
    assert not {"sampler_post_cfg_function"} & set(model.model_options) and "sampler_post_cfg_function" in carrying.model_options


def test_a_speed_lora_can_be_what_training_starts_from(comfyui, teacher, distil, pack, refused):
    make = pack("nodes.student").WanLiteCreateStudent
    same, _ = call(make, model=teacher, prompts=BANK, latent=LATENT, preset="same size")
    folder = comfyui.base / "models/loras"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    width = teacher.model.diffusion_model.dim
    save_file({"diffusion_model.blocks.0.self_attn.o.lora_down.weight": torch.randn(2, width, generator=generator) * 0.3,
               "diffusion_model.blocks.0.self_attn.o.lora_up.weight": torch.randn(width, 2, generator=generator) * 0.3}, folder / "speed.safetensors")
    save_file({"lora_te_x.lora_down.weight": torch.randn(2, 8)}, folder / "foreign.safetensors")
    node = pack("nodes.recipe").WanLiteRecipe
    settings = {"rank": 2, "learning_rate": 2e-3, "teacher_steps": 2, "evaluations": 1}
    assert {"none", "speed.safetensors"} <= set(next(w for w in node.GET_SCHEMA().inputs if w.id == "start_from").options)
    for preset in ("no-cfg", "few-step 4"):
        healing = call(node, start_from="speed.safetensors", **settings)[0]
        student, _, _, report, _ = distil(f"healed-{preset}", student=same, preset=preset, recipe=healing, steps=20)
        assert "times below the LoRA as it was" in report and student.loras and student.card.cfg == 1.0, report
    with refused("is no LoRA for a WAN"):
        distil("foreign", student=same, preset="no-cfg", recipe=call(node, start_from="foreign.safetensors", **settings)[0])
