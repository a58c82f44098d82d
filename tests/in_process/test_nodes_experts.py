"""A tiny pair of experts through the nodes: each student takes its teacher's place in the stock graph of two KSamplerAdvanced."""
import pytest
import torch
from helpers_bridge import call, empty_latent, relative
from helpers_tiny import random_bank, random_wan

STEPS, SHIFT, CFG = 6, 5.0, 2.0
LATENT = empty_latent(width=64, height=64, frames=5)
SIDES = ("high", "low")


@pytest.fixture(scope="module")
def models(comfyui):
    """The MODELs of both experts: random, and alike in all but a part, as two fine-tunes of one model are."""
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    base, opened = random_wan(seed=3, depth=2, ffn_dim=128), {}
    for number, side in enumerate(SIDES):
        torch.manual_seed(40 + number)
        weights = {name: value + torch.randn_like(value) * 0.02 for name, value in base.state_dict().items()}
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})
            opened[side] = ModelSamplingSD3().patch(model, SHIFT)[0]
    return opened


@pytest.fixture(scope="module")
def bank(pack):
    given = random_bank(8)
    return pack("wanlite_model.prompts").PromptBank(prompts=given.prompts, contexts=given.contexts, negative_text="", negative=given.negative)


def others(side):
    return "low" if side == "high" else "high"


@pytest.fixture(scope="module")
def students(models, bank, pack):
    """{side: (MODEL, report)} after a short no-cfg job each; both jobs share a cache."""
    recipe = {"learning_rate": 3e-3, "teacher_steps": STEPS, "batch_size": 8, "evaluations": 2, "ema_decay": 0.9}
    made = {}
    for side in SIDES:
        start, _ = call(pack("nodes.student").WanLiteCreateStudent, model=models[side], prompts=bank, latent=LATENT, preset="same size",
                        expert=f"{side} noise", other_expert=models[others(side)])
        _, model, _, report, _ = call(pack("nodes.distill").WanLiteDistill, student=start, model=models[side], other_expert=models[others(side)], prompts=bank,
                                      latent=LATENT, preset="no-cfg", cfg=CFG, steps=80, run_name=f"expert {side}", recipe=recipe)
        made[side] = model, report
    return made


def two_samplers(comfyui, high, low, bank, pack, cfgs, switch, prompt=None):
    """The stock graph: the high expert's steps with its noise left over, then the low expert's without new noise."""
    told = pack("nodes.comfy_bridge.conditions").conditioning
    positive, negative = told(bank.contexts[bank.held_out[0] if prompt is None else prompt]), told(bank.negative)
    sampler = comfyui.nodes.KSamplerAdvanced()
    with torch.inference_mode():
        (half,) = sampler.sample(high, "enable", 5, STEPS, cfgs[0], "euler", "simple", positive, negative, LATENT, 0, switch, "enable")
        (whole,) = sampler.sample(low, "disable", 5, STEPS, cfgs[1], "euler", "simple", positive, negative, half, switch, 10000, "disable")
    return whole["samples"].clone()


def test_each_student_takes_its_teachers_place(comfyui, models, students, bank, pack):
    assert "of the 6 steps it makes 0 to 3 " in students["high"][1] and "of the 6 steps it makes 3 to 6 " in students["low"][1]

    def clip(high, low, *cfgs):
        return two_samplers(comfyui, high, low, bank, pack, cfgs, switch=3)

    teacher = clip(models["high"], models["low"], CFG, CFG)
    swapped = {"high": lambda student, cfg: clip(student, models["low"], cfg, CFG), "low": lambda student, cfg: clip(models["high"], student, CFG, cfg)}
    for side, sample in swapped.items():
        with_student, without_cfg = relative(sample(students[side][0], 1.0), teacher), relative(sample(models[side], 1.0), teacher)
        assert with_student < 0.75 * without_cfg, (side, with_student, without_cfg)
        wrong = sample(students[others(side)][0], 1.0)
        assert relative(wrong, teacher) > 1.5 * with_student, side
    both = relative(clip(students["high"][0], students["low"][0], 1.0, 1.0), teacher)
    neither = relative(clip(models["high"], models["low"], 1.0, 1.0), teacher)
    assert both < 0.6 * neither, (both, neither)


def frames(images, place):
    """Those of one MODEL, without the line of text above them."""
    return images[:, 28:, place * 68:place * 68 + 64]


@pytest.mark.parametrize("side", SIDES)
def test_compare_samples_both_experts_as_the_stock_graph_does(side, comfyui, models, students, bank, vae, pack):
    settings = {"teacher_steps": STEPS, "teacher_cfg": CFG, "student_steps": STEPS, "student_cfg": 1.0, "clips": 2, "noise_number": 5}
    given = {"teacher": models[side], "student": students[side][0], "prompts": bank, "vae": vae, "latent": LATENT, "expert": f"{side} noise",
             "other_expert": models[others(side)]}
    images, text, *_ = call(pack("nodes.compare").WanLiteCompare, **given, **settings)
    first = images[:len(images) // 2]
    assert f"make the part of {side} noise" in text and "one and the same other expert the rest, along 6 steps at cfg 2" in text
    for place, its in enumerate(({side: (models[side], CFG)}, {side: (students[side][0], 1.0)})):
        pair = {others(side): (models[others(side)], CFG), **its}
        (high, high_cfg), (low, low_cfg) = pair["high"], pair["low"]
        latents = two_samplers(comfyui, high, low, bank, pack, (high_cfg, low_cfg), switch=3, prompt=0)
        with torch.inference_mode():
            (pictures,) = comfyui.nodes.VAEDecode().decode(vae, {"samples": latents})
        torch.testing.assert_close(frames(first, place), pictures.clamp(0, 1), atol=1e-4, rtol=0)
    again = call(pack("nodes.compare").WanLiteCompare, **given, **settings)[1]
    assert "2 of the teacher's clips" in again
    moved = call(pack("nodes.compare").WanLiteCompare, **given, **settings, boundary=0.95)
    assert "earlier comparison" not in moved[1] and not torch.equal(frames(moved[0], 0), frames(images, 0))


def test_steps_of_the_experts_meet_at_the_taught_ones_level(models, pack):
    clips = pack("nodes.comfy_bridge.clips")
    asked = {"teacher": (models["high"], 7, CFG), "student": (models["high"], 4, 1.0)}
    how = clips.How("euler", "simple")
    teacher, student = clips.contenders(asked, models["low"], "high noise", 0.0)
    [(first, own), (second, rest)] = student.parts(how)
    assert (first.model, first.cfg, second.model, second.cfg) == (models["high"], 1.0, models["low"], CFG)
    whole = teacher.parts(how)
    assert own[-1] == rest[0] < 0.875 < own[-2] and len(own) == 3
    assert torch.equal(rest[1:], torch.cat([part for _, part in whole])[-len(rest) + 1:]) and len(whole[0][1]) + len(whole[1][1]) == 9
    low = clips.contenders({"teacher": (models["low"], 7, CFG), "student": (models["low"], 4, 1.0)}, models["high"], "low noise", 0.0)[1]
    [(first, rest), (second, own)] = low.parts(how)
    assert (first.model, first.cfg, second.model) == (models["high"], CFG, models["low"]) and rest[-1] == own[0] < 0.875 and len(own) == 3
    assert torch.equal(rest[:-1], first.sigmas(how)[:len(rest) - 1]) and len(rest) == 5


def test_both_jobs_asked_the_teachers_once(comfyui, students):
    units = list((comfyui.base / "output/wanlite/cache").glob("*.safetensors"))
    runs = comfyui.base / "output/wanlite/runs"
    assert units and all((runs / f"expert {side}").is_dir() for side in SIDES)
    oldest = min(path.stat().st_mtime for path in (runs / "expert low").iterdir())
    assert all(unit.stat().st_mtime <= oldest + 1 for unit in units)


def test_the_high_experts_student_is_saved_with_a_graph_of_both(comfyui, students, models, bank, pack):
    start, _ = call(pack("nodes.student").WanLiteCreateStudent, model=models["high"], prompts=bank, latent=LATENT, preset="1/2 of the blocks",
                    expert="high noise", other_expert=models["low"])
    name, report = call(pack("nodes.student").WanLiteSaveStudent, student=start, name="half of the high one")[:2]
    workflow = (comfyui.base / "models/diffusion_models/half of the high one/half of the high one.workflow.json").read_text(encoding="utf-8")
    assert workflow.count('"type": "KSamplerAdvanced"') == 2 and "low_noise" in workflow and "verified" in report
    again, _ = call(pack("nodes.student").WanLiteLoadStudent, name=name)
    assert again.card.expert == "high" and again.card.boundary == 0.875


def wrong_graphs():
    return {
        "no other": ({"expert": "high noise"}, "the other one is not connected"),
        "not said which": ({"other_expert": "low"}, "not said which of the two"),
        "twice the same": ({"expert": "high noise", "other_expert": "high"}, "same weights"),
    }


@pytest.mark.parametrize("what", wrong_graphs())
def test_a_graph_that_does_not_say_which_is_refused(what, models, bank, pack, refused):
    given, words = wrong_graphs()[what]
    given = {name: models.get(value, value) for name, value in given.items()}
    with refused(words):
        call(pack("nodes.student").WanLiteCreateStudent, model=models["high"], prompts=bank, latent=LATENT, preset="1/2 of the blocks", **given)
    start, _ = call(pack("nodes.student").WanLiteCreateStudent, model=models["high"], prompts=bank, latent=LATENT, preset="1/2 of the blocks")
    with refused(words):
        call(pack("nodes.distill").WanLiteDistill, student=start, model=models["high"], prompts=bank, latent=LATENT, preset="slim", run_name="wrong", **given)
    if what != "twice the same":        # which is nonsense, and harmless
        with refused(words):
            call(pack("nodes.compare").WanLiteCompare, teacher=models["high"], student=models["high"], prompts=bank, vae=None, latent=LATENT, **given)


def test_a_student_keeps_to_the_side_that_it_was_made_for(models, bank, pack, refused):
    start, _ = call(pack("nodes.student").WanLiteCreateStudent, model=models["high"], prompts=bank, latent=LATENT, preset="1/2 of the blocks",
                    expert="high noise", other_expert=models["low"])
    for choice in ("low noise", "not one of two"):
        with refused("was made as the expert of high noise"):
            call(pack("nodes.distill").WanLiteDistill, student=start, model=models["high"], other_expert=models["low"], prompts=bank, latent=LATENT, preset="slim",
                 expert=choice, run_name="other side")


def test_the_boundary_is_wans_own_the_students_or_the_recipes(models, pack):
    recipe = call(pack("nodes.recipe").WanLiteRecipe, boundary=0.95)[0]
    assert recipe == {"boundary": 0.95}
    find, teacher = pack("nodes.comfy_bridge.experts").other_of, pack("nodes.comfy_bridge.teacher").ComfyTeacher(models["high"])
    card = pack("wanlite_model.formats.card").StudentCard(expert="high", boundary=0.8)
    assert find(teacher, models["low"], "high noise").role.boundary == 0.875
    assert find(teacher, models["low"], "as the student was made", 0.0, card).role.boundary == 0.8
    assert find(teacher, models["low"], "as the student was made", recipe["boundary"], card).role.boundary == 0.95


def test_a_14b_that_may_be_one_of_two_is_spoken_of_until_somebody_says(models, pack):
    note, config = pack("nodes.comfy_bridge.experts").expert_note, pack("wanlite_model.config").WanConfig
    large = config(dim=5120, ffn_dim=13824, num_layers=40)
    for choice in ("not one of two", "as the student was made"):
        assert "If this is one expert of Wan 2.2 A14B" in note(large, None, choice)[0]
    assert not note(large, None, "low noise, at every level") and not note(large, models["low"], "high noise")
    assert not note(config(dim=1536, ffn_dim=8960, num_layers=30), None, "not one of two")


def test_an_i2v_expert_is_never_taken_for_a_whole_wan(comfyui, bank, pack, refused):
    import comfy.sd
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(dict(random_wan(depth=2, model_type="i2v", in_dim=36).state_dict()), model_options={"dtype": torch.float32})
    image = pack("wanlite_model.cond").Shown(image=torch.zeros(20, 2, 8, 8))
    shown = type(bank)(prompts=bank.prompts, contexts=bank.contexts, negative_text="", negative=bank.negative, shown=(image,) * len(bank))
    given = {"model": model, "prompts": shown, "latent": LATENT, "preset": "1/2 of the blocks"}
    with refused("one of the two experts of 2.2 I2V-A14B"):
        call(pack("nodes.student").WanLiteCreateStudent, **given)
    start, _ = call(pack("nodes.student").WanLiteCreateStudent, **given, expert="low noise, at every level")
    assert start.card.expert == ""
    find, teacher = pack("nodes.comfy_bridge.experts").other_of, pack("nodes.comfy_bridge.teacher").ComfyTeacher(model)
    assert find(teacher, None, "as the student was made", card=start.card) is None
    for unsaid in (None, pack("wanlite_model.formats.card").StudentCard(teacher_fingerprint="0")):
        with refused("one of the two experts of 2.2 I2V-A14B"):
            find(teacher, None, "as the student was made", card=unsaid)
