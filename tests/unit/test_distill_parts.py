"""Jobs, the teacher cache, targets, evaluation, learning rate: each for itself."""
import dataclasses
import itertools

import pytest
import torch
from helpers_compress import result_of
from helpers_tiny import random_bank, random_teacher, random_wan

from wanlite_model import flow
from wanlite_model.compress.importance import make_probe
from wanlite_model.distill import objectives
from wanlite_model.distill.data import STATES_OF_PROMPT, REUSE, TeacherCache, latents_fingerprint, plan_units
from wanlite_model.distill.paths import state_counts
from wanlite_model.distill.evaluate import evaluate
from wanlite_model.distill.job import DistillJob, Recipe, differences
from wanlite_model.distill.optim import WeightAverage, lr_at, make_optimizer
from wanlite_model.errors import WanLiteError
from wanlite_model.prompts import PromptBank
from wanlite_model.teacher import guided_velocity

SHAPE = (16, 2, 4, 4)


def make_job(teacher, bank, **changes):
    recipe = Recipe(teacher_steps=4, batch_size=6, **changes.pop("recipe", {}))
    return DistillJob(**{"student": "s", "teacher": teacher.fingerprint, "prompts": bank.fingerprint, "shape": SHAPE, "shift": teacher.shift,
                         "cfg": 3.0, "recipe": recipe, **changes})


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    teacher, bank = random_teacher(depth=2), random_bank(3)
    job = make_job(teacher, bank)
    cache = TeacherCache(tmp_path_factory.mktemp("cache"), job, plan_units(job, bank, None))
    progress = list(cache.fill(teacher, bank, None))
    return teacher, bank, job, cache, progress


def test_a_job_survives_json_and_names_what_differs():
    teacher, bank = random_teacher(depth=1), random_bank()
    job = make_job(teacher, bank, sigmas=(1.0, 0.5, 0.0))
    assert DistillJob.from_json(job.to_json()) == job
    other = dataclasses.replace(job, cfg=7.0, recipe=dataclasses.replace(job.recipe, learning_rate=1e-3, save_every=3.0))
    assert differences(job, other) == ["cfg=3.0, not 7.0", "recipe.learning_rate=0.0001, not 0.001"]


def test_a_value_that_decides_nothing_keeps_no_run_from_going_on():
    job = make_job(random_teacher(depth=1), random_bank(), steps=5)
    assert differences(job, dataclasses.replace(job, minutes=1.0)) == []
    timed = dataclasses.replace(job, steps=0)
    assert differences(timed, dataclasses.replace(timed, minutes=1.0)) == [] == differences(timed, job)
    on_path = dataclasses.replace(job, sigmas=(1.0, 0.5, 0.0))
    other_steps = dataclasses.replace(job.recipe, teacher_steps=9)
    assert differences(on_path, dataclasses.replace(on_path, recipe=other_steps)) == []
    assert differences(job, dataclasses.replace(job, recipe=other_steps)) == ["recipe.teacher_steps=4, not 9"]


@pytest.mark.parametrize("change", [{"cfg": 0.5}, {"steps": -1}, {"minutes": -1}, {"shift": 0}, {"sigmas": (0.5, 1.0, 0.0)}, {"sigmas": (1.0, 0.5)}, {"sigmas": (0.5, 0.25, 0.0)},
                                    {"recipe": {"learning_rate": 1.0}}, {"recipe": {"objective": "magic"}}, {"recipe": {"renoised": 2}},
                                    {"cfg": float("nan")}], ids=str)
def test_values_out_of_range_are_refused_in_words(change):
    with pytest.raises(WanLiteError):
        make_job(random_teacher(depth=1), random_bank(), **change)


def test_progress_is_told_forward_by_forward_and_reaches_the_end(filled):
    *_, progress = filled
    total = progress[-1][1]
    assert progress == [(done, total) for done in range(1, total + 1)] and total >= sum(state_counts(filled[2]))
    teacher, bank, _, cache, _ = filled
    assert list(cache.fill(teacher, bank, None)) == [(total, total)]            # one group, which is there already


def test_cached_answers_are_the_teachers_own_at_those_states(filled):
    teacher, bank, job, cache, _ = filled
    batch = cache.batch(0)
    expected = guided_velocity(teacher, batch.x, batch.sigma, bank.cond(batch.prompts), bank.negative_cond(batch.prompts), job.cfg)
    torch.testing.assert_close(batch.guided(job.cfg), expected, atol=0.02, rtol=0.02)      # stored in fp16


def test_the_path_leads_where_the_sampler_goes(filled):
    teacher, bank, job, cache, _ = filled
    unit = cache.units[0]
    first, last = cache._state(unit, 0), cache._state(unit, 3)
    x0 = flow.sample(lambda x, s: guided_velocity(teacher, x, s, bank.cond([0]), bank.negative_cond([0]), job.cfg), first["x"], flow.schedule(4, job.shift))
    v = flow.guided(last["v_neg"], last["v_pos"], job.cfg)
    torch.testing.assert_close(flow.denoised(last["x"], v, last["sigma"]), x0, atol=0.02, rtol=0.02)


def test_a_batch_is_a_function_of_its_step_alone(filled):
    cache = filled[3]
    assert torch.equal(cache.batch(7).x, cache.batch(7).x) and not torch.equal(cache.batch(7).x, cache.batch(8).x)


def test_held_out_units_are_never_drawn(filled):
    cache = filled[3]
    held = {tuple(cache._state(unit, k)["x"].flatten()[:8].tolist()) for unit in cache.held for k in range(sum(state_counts(cache.job)))}
    drawn = {tuple(x.flatten()[:8].tolist()) for step in range(60) for x in cache.batch(step).x}
    assert held and not held & drawn
    assert {tuple(x.flatten()[:8].tolist()) for x in cache.held_out().x} <= held


def test_with_eight_prompts_whole_prompts_are_held_out_and_below_it_other_noise():
    teacher = random_teacher(depth=1)
    for count, by_prompt in ((7, False), (8, True), (40, True)):
        bank = random_bank(count)
        units = plan_units(make_job(teacher, bank), bank, None)
        held, trained = ({unit.prompt for unit in units if unit.held is which} for which in (True, False))
        assert held and trained and (not held & trained) == by_prompt, count


def test_every_job_on_the_same_prompts_holds_out_the_same():
    """However short it is, and whatever it is to learn: what one preset trained on must not be what the next is measured on."""
    teacher, bank = random_teacher(depth=1), random_bank(40)
    job = make_job(teacher, bank)
    few = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, objective="trajectory", student_steps=2))
    assert len(bank.held_out) == 5 and set(bank.held_out) != set(range(5))
    for some, most in itertools.product((job, few), (2, 5, 9, 30, None)):
        units = plan_units(some, bank, None, most)
        assert any(unit.held for unit in units) and not all(unit.held for unit in units)
        assert all(unit.held == (unit.prompt in bank.held_out) for unit in units), most
    turned = PromptBank(prompts=bank.prompts[::-1], contexts=bank.contexts[::-1], negative_text=bank.negative_text, negative=bank.negative)
    assert {turned.prompts[i] for i in turned.held_out} == {bank.prompts[i] for i in bank.held_out}
    probe = result_of(make_probe(teacher, bank, SHAPE, seed=0, count=80, cfg=3.0, each=1))
    asked = {i for i, context in enumerate(bank.contexts) for other in probe.cond.context if torch.equal(context, other[:len(context)])}
    assert asked == set(range(40)) - set(bank.held_out)         # nor do blocks that are chosen and trained for a start see them


def test_prompts_are_asked_again_with_other_noise_when_the_states_would_not_do():
    teacher, bank = random_teacher(depth=1), random_bank(16)
    job = make_job(teacher, bank)
    few, enough = (plan_units(dataclasses.replace(job, steps=steps), bank, None) for steps in (1, 10_000))
    assert sorted(unit.prompt for unit in few) == list(range(16)) and enough[:16] == few
    held = {unit.prompt for unit in few if unit.held}
    again = [unit.prompt for unit in enough[16:]]
    assert len(enough) == 16 * (STATES_OF_PROMPT // sum(state_counts(job))) and not held & set(again) and set(again) == set(range(16)) - held
    assert len({unit.key for unit in enough}) == len(enough)
    steps = REUSE * sum(state_counts(job)) * 40 // job.recipe.batch_size
    assert len(plan_units(dataclasses.replace(job, steps=steps), bank, None)) == 40
    many = random_bank(100)
    assert len(plan_units(dataclasses.replace(make_job(teacher, many), steps=5), many, None)) == 30      # no more than there are draws
    assert len(plan_units(dataclasses.replace(job, steps=0), bank, None)) == len(enough)           # minutes decide how many of them


def test_a_unit_holds_re_noised_states_in_their_share():
    teacher, bank = random_teacher(depth=1), random_bank()
    counts = [state_counts(make_job(teacher, bank, recipe={"renoised": share})) for share in (0.0, 0.1, 0.5, 0.7, 1.0)]
    assert counts == [(4, 0, 0), (4, 1, 0), (4, 4, 0), (4, 9, 0), (4, 12, 0)]


def test_a_corrupt_or_foreign_unit_is_asked_for_again(filled):
    teacher, bank, job, cache, _ = filled
    whole = cache.path(cache.units[0]).read_bytes()
    for damage in (whole[:200], b"", cache.path(cache.units[1]).read_bytes()):
        cache.path(cache.units[0]).write_bytes(damage)
        assert not cache.intact(cache.units[0])
        list(cache.fill(teacher, bank, None))
        assert cache.path(cache.units[0]).read_bytes() == whole


def test_a_longer_job_leaves_the_units_alone_that_are_there(filled):
    teacher, bank, job, cache, _ = filled
    path, stamp = cache.path(cache.units[3]), cache.path(cache.units[3]).stat().st_mtime_ns
    cache.path(cache.units[2]).unlink()
    list(cache.fill(teacher, bank, None))
    assert path.stat().st_mtime_ns == stamp and cache.intact(cache.units[2])


def test_minutes_buy_missing_units_only(filled):
    cache = filled[3]
    assert cache.affordable(0) == len(cache.units)
    kept = cache.path(cache.units[5]).read_bytes()
    cache.path(cache.units[5]).unlink()
    assert cache.affordable(0) == 5 and cache.affordable(1) == len(cache.units)
    cache.path(cache.units[5]).write_bytes(kept)


def test_what_decides_an_answer_is_in_its_units_name(filled):
    teacher, bank, job, cache, _ = filled
    changes = ({"cfg": 2.0}, {"shift": 1.0}, {"train_seed": 1}, {"teacher": "other"}, {"sigmas": (1.0, 0.5, 0.0)}, {"shape": (16, 1, 4, 4)},
               {"recipe": dataclasses.replace(job.recipe, renoised=0.0)}, {"recipe": dataclasses.replace(job.recipe, full_range=0.0)})
    keys = {plan_units(dataclasses.replace(job, **change), bank, None)[0].key for change in changes} | {cache.units[0].key}
    assert len(keys) == len(changes) + 1
    assert plan_units(dataclasses.replace(job, steps=9, minutes=1.0), bank, None)[0].key == cache.units[0].key


def test_an_answer_that_is_not_finite_is_refused_and_not_kept(tmp_path):
    teacher, bank = random_teacher(depth=1), random_bank()
    with torch.no_grad():
        teacher.module.head.head.bias.fill_(float("inf"))
    job = make_job(teacher, bank)
    cache = TeacherCache(tmp_path, job, plan_units(job, bank, None))
    with pytest.raises(WanLiteError, match="not finite"):
        list(cache.fill(teacher, bank, None))
    assert list(tmp_path.iterdir()) == []


def test_latents_have_a_fingerprint_of_their_own():
    one = torch.randn(2, *SHAPE)
    assert latents_fingerprint(None) == "" and latents_fingerprint(one) == latents_fingerprint(one.clone()) != latents_fingerprint(one + 1)


def test_the_teacher_itself_has_no_error_but_for_the_guidance_it_lacks(filled):
    teacher, bank, job, cache, _ = filled
    held = cache.held_out()
    kept = result_of(evaluate(teacher.module, held, bank, dataclasses.replace(job, fold_guidance=False)))
    assert kept.error < 1e-3
    folded = result_of(evaluate(teacher.module, held, bank, job))
    assert folded.closure == pytest.approx(0, abs=0.01) and folded.error > 10 * kept.error
    other = result_of(evaluate(random_wan(seed=9, depth=2), held, bank, job))
    assert other.error > folded.error and len(other.buckets) == 4


def test_how_a_batch_is_split_changes_nothing_but_rounding():
    v, target = torch.randn(2, 6, 4, 1, 2, 2)
    scale = target.square().mean()
    whole = objectives.velocity_loss(v, target, scale).mean()
    parts = sum(objectives.velocity_loss(v[i:i + 2], target[i:i + 2], scale).mean() / 3 for i in (0, 2, 4))
    torch.testing.assert_close(parts, whole)
    assert objectives.velocity_loss(2 * target, target, scale).mean() == pytest.approx(1.0)


def test_features_are_matched_across_the_gap_that_was_cut():
    assert objectives.feature_pairs((0, 1, 4, 5), 6) == [(1, 3)]
    assert objectives.feature_pairs((0, 2, 4), 6) == [(0, 1), (1, 3), (2, 5)]
    whole = objectives.feature_pairs(tuple(range(12)), 12)
    assert len(whole) == 4 and whole[-1] == (11, 11) and all(mine == its for mine, its in whole)


def test_one_massive_activation_is_not_the_whole_feature_loss():
    its = {0: torch.randn(2, 50, 64)}
    mine = {0: its[0] + 0.1}
    calm = objectives.feature_loss(mine, its, [(0, 0)])
    its[0][0, 0, 0] = mine[0][0, 0, 0] = 500.0
    mine[0][0, 0, 0] += 300
    assert objectives.feature_loss(mine, its, [(0, 0)]) == pytest.approx(float(calm), rel=0.3)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    recipe = Recipe(learning_rate=1e-3, warmup=10)
    rates = [lr_at(step, 100, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) and max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=0.05) and rates[10:] == sorted(rates[10:], reverse=True)


def test_muon_steps_are_orthogonal_and_as_large_as_adamws():
    draw = torch.Generator().manual_seed(0)
    trained = {"blocks.0.ffn.0.weight": torch.nn.Parameter(torch.zeros(64, 16)), "blocks.1.ffn.0.weight": torch.nn.Parameter(torch.zeros(64, 16)),
               "blocks.0.ffn.0.bias": torch.nn.Parameter(torch.zeros(64)), "head.head.weight": torch.nn.Parameter(torch.zeros(8, 16))}
    for optimizer in ("AdamW", "Muon"):
        moving = make_optimizer(trained, Recipe(optimizer=optimizer, learning_rate=0.01))
        for value in trained.values():
            value.data.zero_()
            value.grad = torch.randn(value.shape, generator=draw)
        moving.step()
        sizes = {name: float(value.detach().square().mean().sqrt()) for name, value in trained.items()}
        assert all(size == pytest.approx(0.01, rel=0.01) for name, size in sizes.items() if optimizer == "AdamW" or "ffn.0.weight" not in name)
        spread = torch.linalg.svdvals(trained["blocks.1.ffn.0.weight"].detach())
        if optimizer == "Muon":
            assert 0.1 < sizes["blocks.0.ffn.0.weight"] / 0.01 < 0.3 and spread.min() > 0.5 * spread.max()
        else:
            assert spread.min() < 0.5 * spread.max()
    trained["blocks.1.ffn.0.weight"].grad = None
    before = trained["blocks.1.ffn.0.weight"].detach().clone()
    moving.step()
    assert torch.equal(trained["blocks.1.ffn.0.weight"], before)                     # what has no gradient stays


def test_the_average_follows_the_weights_and_gives_them_back():
    module = random_wan(depth=1)
    average = WeightAverage(dict(module.named_parameters()), decay=0.5)
    before = module.head.head.bias.detach().clone()
    with torch.no_grad():
        module.head.head.bias.add_(1.0)
    average.update(step=100)
    with average.in_place():
        torch.testing.assert_close(module.head.head.bias, before + 0.5)
    torch.testing.assert_close(module.head.head.bias, before + 1.0)
