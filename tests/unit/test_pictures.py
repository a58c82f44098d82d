"""A WAN that is told pictures: what it is asked with them, prompts that come with them, and what is cut from it."""
import dataclasses
import os

import pytest
import torch
from helpers_compress import CountingTeacher, counting_teacher, result_of
from helpers_pictures import FIELDS, TOLD, picture_bank, pictures, shape_of, with_shown
from helpers_tiny import random_bank, random_wan

from wanlite_model import flow
from wanlite_model.compress import blockwise, build
from wanlite_model.compress.build import create_student
from wanlite_model.compress.importance import make_probe
from wanlite_model.compress.plan import CompressionPlan
from wanlite_model.compress.walk import Walk
from wanlite_model.cond import Cond, Shown, chosen, joined
from wanlite_model.config import WanConfig
from wanlite_model.distill.dry import dry_run
from wanlite_model.distill.evaluate import student_velocity
from wanlite_model.errors import WanLiteError
from wanlite_model.prompts import PromptBank
from wanlite_model.swap import lay_out
from wanlite_model.teacher import ModuleTeacher, at_work, guided_velocity
from wanlite_model.transformer import WanLiteStudent

kinds = pytest.mark.parametrize("kind", FIELDS)
SIGMA = torch.tensor([0.9, 0.3])


def asked(kind, depth=2, **changes):
    """(teacher, x [2, C, 3, 4, 4], what is told with each)."""
    shape = shape_of(kind)
    teacher = ModuleTeacher(random_wan(depth=depth, **FIELDS[kind]), shift=3.0)
    return teacher, torch.randn(2, *shape, generator=torch.Generator().manual_seed(5)), picture_bank(kind, 2, shape, **changes).cond([0, 1])


# ---- what is told with a state


def test_given_frames_are_put_in_place_asked_about_at_no_noise_and_answered_with_nothing():
    x, given = torch.randn(2, 48, 4, 2, 2), torch.randn(2, 48, 2, 2, 2)
    told = Cond(context=torch.zeros(2, 1, 4096), given=given)
    placed, answer = told.placed(x), told.answer(x)
    assert torch.equal(placed[:, :, :2], given) and torch.equal(placed[:, :, 2:], x[:, :, 2:]) and torch.equal(told.input(x), placed)
    assert not answer[:, :, :2].any() and torch.equal(answer[:, :, 2:], x[:, :, 2:]) and torch.equal(told.made(x), x[:, :, 2:])
    torch.testing.assert_close(told.timestep(x, SIGMA), torch.tensor([[0.0, 0.0, 900.0, 900.0], [0.0, 0.0, 300.0, 300.0]]))


def test_without_given_frames_all_is_as_it_is():
    x, image = torch.randn(2, 16, 4, 2, 2), torch.randn(2, 20, 4, 2, 2)
    told = Cond(context=torch.zeros(2, 1, 4096), image=image)
    assert told.placed(x) is told.answer(x) is told.made(x) is x
    assert torch.equal(told.input(x), torch.cat((x, image), dim=1)) and torch.equal(told.timestep(x, SIGMA), 1000 * SIGMA)


def test_conditions_are_joined_parted_and_chosen_row_by_row():
    def told(rows, length, value):
        return Cond(context=torch.full((rows, length, 4096), value), image=torch.full((rows, 20, 1, 2, 2), value), clip_fea=torch.full((rows, 3, 1280), value))

    both = joined((told(2, 3, 1.0), told(1, 5, 2.0)))
    assert len(both) == 3 and both.context.shape == (3, 5, 4096) and not both.context[:2, 3:].any() and both.given is None
    for value in (both.context[:, 0, 0], both.image[:, 0, 0, 0, 0], both.clip_fea[:, 0, 0]):
        assert value.tolist() == [1.0, 1.0, 2.0]
    assert both[1:].image.mean() == 1.5 and torch.equal(both[torch.tensor([2, 0])].clip_fea[:, 0, 0], torch.tensor([2.0, 1.0]))
    positive, negative = told(2, 2, 3.0), told(2, 4, 3.0)
    mixed = chosen(torch.tensor([True, False]), negative, positive)
    assert mixed.context[0].eq(3).all() and mixed.context[1, :2].eq(3).all() and not mixed.context[1, 2:].any()
    assert torch.equal(mixed.image, positive.image) and torch.equal(mixed.clip_fea, positive.clip_fea)


@kinds
def test_a_teacher_answers_to_all_that_it_is_told_and_a_student_alike(kind):
    teacher, x, told = asked(kind)
    v = teacher.velocity(x, SIGMA, told)
    with torch.no_grad():
        assert torch.equal(student_velocity(teacher.module, x, SIGMA, told), v)
        fed = x if told.image is None else torch.cat((x, told.image), dim=1)
        t = 1000 * SIGMA
        if told.given is not None:
            fed, t = torch.cat((told.given, x[:, :, 1:]), dim=2), torch.stack((torch.zeros(2), t, t), dim=1)
        network = teacher.module(fed, t, told.context, clip_fea=told.clip_fea)
    assert torch.equal(told.made(network), told.made(v))
    for name in (*TOLD[kind], "context"):
        other = dataclasses.replace(told, **{name: getattr(told, name).flip(-1)})
        assert (teacher.velocity(x, SIGMA, other) - v).abs().max() > 1e-3 * v.abs().max(), name


def test_what_a_state_holds_where_frames_are_given_is_nothing_to_teacher_or_student():
    teacher, x, told = asked("TI2V")
    other, seen = x.clone(), [{}, {}]
    other[:, :, 0] = 100.0
    for state, found in ((x, seen[0]), (other, seen[1])):
        found["v"] = teacher.velocity(state, SIGMA, told, taps={"blocks.1": lambda _, answered, found=found: found.update(tap=answered)})
        with torch.no_grad():
            found["student"], features = student_velocity(teacher.module, state, SIGMA, told, features=[0])
        found["features"] = features[0]
    assert all(torch.equal(value, seen[1][name]) for name, value in seen[0].items()) and len(seen[0]) == 4
    assert not seen[0]["v"][:, :, 0].any() and not seen[0]["student"][:, :, 0].any() and seen[0]["v"][:, :, 1:].abs().min() > 0
    other[:, :, 1] += 1.0
    assert not torch.allclose(teacher.velocity(other, SIGMA, told), seen[0]["v"])


def test_a_rollout_ends_with_the_given_frames_as_they_are():
    teacher, x, told = asked("TI2V")
    negative = dataclasses.replace(told, context=told.context.flip(0))
    path = list(flow.euler_steps(lambda x, sigma: guided_velocity(teacher, x, sigma, told, negative, 3.0), told.placed(x), flow.schedule(5, 3.0)))
    assert all(torch.equal(state[:, :, :1], told.given) for state, _, _ in path) and not torch.allclose(path[-1][0], path[0][0])
    x0 = torch.randn_like(x)
    end = flow.sample(lambda _, __: told.answer(flow.velocity(x0, x)), told.placed(x), flow.schedule(5, 3.0))         # one that knows the clip
    torch.testing.assert_close(told.made(end), told.made(x0))
    assert torch.equal(end[:, :, :1], told.given)


@pytest.mark.parametrize("train", [False, True], ids=["a forward", "a block's training"])
def test_given_frames_take_no_memory_for_each_token(train):
    """Each frame has its own noise level: told to every token it would be six numbers in fp32 beside each of the token's."""
    config, shape = WanConfig(model_type="ti2v", dim=3072, ffn_dim=14336, num_layers=2, in_dim=48, out_dim=48), (48, 21, 44, 80)

    def peak(**more):
        with dry_run("cuda") as dry:
            module = WanLiteStudent.from_wan(config, "meta", torch.bfloat16).requires_grad_(False)
            lay_out(module, torch.device("cuda"))
            module.blocks[0].requires_grad_(train)
            told = Cond(context=torch.empty(1, 60, 4096, device="cuda"), **{name: torch.empty(size, device="cuda") for name, size in more.items()})
            x, held = torch.empty(1, *shape, device="cuda"), dry.now("cuda")
            with torch.set_grad_enabled(train):
                v = told.asked(module, x, torch.ones(1, device="cuda"))
                if train:
                    v.square().mean().backward()
            return dry.peak("cuda") - held

    numbers = at_work(config, (1, *shape)) / 60
    plain, with_given = peak(), peak(given=(1, 48, 1, 44, 80))
    assert abs(with_given - plain) < numbers and plain > 20 * numbers


# ---- prompts that come with pictures


@kinds
def test_a_bank_with_pictures_survives_its_file_in_float16(tmp_path, kind):
    bank = picture_bank(kind, 3, shape_of(kind))
    bank.save(tmp_path / "bank.safetensors")
    again = PromptBank.load(tmp_path / "bank.safetensors")
    assert again.fingerprint == bank.fingerprint and len(again.shown) == 3
    for mine, its, exact in zip(bank.shown, again.shown, pictures(kind, 3, shape_of(kind))):
        assert mine.tensors().keys() == its.tensors().keys() == set(TOLD[kind])
        for name, value in its.tensors().items():
            assert value.dtype == torch.float16 and torch.equal(value, mine.tensors()[name]) and torch.equal(value, exact.tensors()[name].half())
    told = again.cond([2, 0])
    assert all(getattr(told, name).dtype == torch.float32 and torch.equal(getattr(told, name)[0], getattr(again.shown[2], name).float()) for name in TOLD[kind])
    beside = again.negative_cond([2, 0])
    assert torch.equal(beside.context[0], again.negative) and all(torch.equal(getattr(beside, name), getattr(told, name)) for name in TOLD[kind])
    held = open("/proc/self/maps", encoding="utf-8").read() if os.path.exists("/proc/self/maps") else ""
    assert str(tmp_path) not in held            # Windows does not replace a file that is


@kinds
def test_a_picture_alone_changes_keys_and_the_fingerprint(kind):
    bank, others = picture_bank(kind, 3, shape_of(kind)), pictures(kind, 3, shape_of(kind), seed=1)
    for name in TOLD[kind]:
        changed = with_shown(bank, [dataclasses.replace(bank.shown[0], **{name: getattr(others[0], name)}), *bank.shown[1:]])
        assert changed.fingerprint != bank.fingerprint and changed.key(0) != bank.key(0) and changed.key(1) == bank.key(1), name
    assert with_shown(bank, bank.shown).fingerprint == bank.fingerprint != with_shown(bank, ()).fingerprint


def test_every_job_on_the_same_texts_holds_out_the_same_whatever_the_size():
    """Else a preset at one size would train on what one at another size is measured on."""
    sizes = [picture_bank("TI2V", 20, shape_of("TI2V", size=size)).held_out for size in (2, 4, 6)]
    assert sizes == [random_bank(20).held_out] * 3 and len(sizes[0]) == 2
    one = random_bank(1)
    alike = PromptBank(prompts=tuple(map(str, range(20))), contexts=one.contexts * 20, negative_text="", negative=one.negative)
    assert alike.held_out == () and len(with_shown(alike, pictures("TI2V", 20, shape_of("TI2V"))).held_out) == 2


@pytest.mark.parametrize("shown", [pictures("2.2 I2V", 2, (16, 3, 4, 4)), (*pictures("2.2 I2V", 2, (16, 3, 4, 4)), *pictures("2.2 I2V", 1, (16, 2, 4, 4))),
                                   (*pictures("2.2 I2V", 2, (16, 3, 4, 4)), *pictures("2.1 I2V", 1, (16, 3, 4, 4))),
                                   (*pictures("TI2V", 2, (48, 3, 4, 4)), Shown())], ids=["too few", "of another size", "with CLIP vision", "one without"])
def test_pictures_that_are_not_alike_are_refused(shown):
    with pytest.raises(WanLiteError, match="Each prompt has its own, and all are alike"):
        with_shown(random_bank(3), shown)


@pytest.mark.parametrize(("kind", "told"), [*((kind, TOLD[kind]) for kind in FIELDS), ("T2V", ())])
def test_a_wan_is_told_what_it_takes_of_a_bank_and_no_more(kind, told):
    config = random_wan(depth=1, **FIELDS.get(kind, {})).wan
    shape = (config.out_dim, 3, 4, 4)
    one = Shown(image=torch.randn(20, 3, 4, 4), clip_fea=torch.randn(257, 1280), given=torch.randn(config.out_dim, 1, 4, 4))
    bank = with_shown(random_bank(2), [one, one])
    fitted = bank.fitted(config, shape)
    assert {name for row in fitted.shown for name in row.tensors()} == set(told) and fitted.prompts == bank.prompts
    assert fitted.fitted(config, shape) is fitted and len(bank.shown[0].tensors()) == 3


@pytest.mark.parametrize(("kind", "shown", "words"), [
    ("2.2 I2V", None, r"\(i2v\) makes videos of pictures, and the prompts come with none"), ("FLF2V", None, "flf2v"),
    ("2.2 I2V", dict(given=(16, 1, 4, 4)), "come with none"), ("2.1 I2V", dict(clip_fea=(257, 1280)), "come with none"),
    ("2.2 I2V", dict(image=(20, 3, 4, 6)), r"\[20, 3, 4, 6\], and this WAN at this size is shown \[20, 3, 4, 4\]"),
    ("2.1 I2V", dict(image=(20, 5, 4, 4)), "at this size"), ("2.2 I2V", dict(image=(52, 3, 4, 4)), "at this size"),
    ("TI2V", dict(given=(48, 1, 6, 4)), r"\[48, 1, 6, 4\], and this WAN at this size is shown \[48, 1, 4, 4\]"), ("TI2V", dict(given=(16, 1, 4, 4)), "own VAE"),
    ("TI2V", dict(given=(48, 3, 4, 4)), "are the whole clip"),
], ids=str)
def test_a_bank_that_a_wan_cannot_take_is_refused_in_words(tmp_path, kind, shown, words):
    bank, teacher = random_bank(2), CountingTeacher(random_wan(depth=3, **FIELDS[kind]), shift=3.0)
    if shown:
        bank = with_shown(bank, 2 * [Shown(**{name: torch.zeros(size) for name, size in shown.items()})])
    with pytest.raises(WanLiteError, match=words):
        bank.fitted(teacher.config, shape_of(kind))
    with pytest.raises(WanLiteError, match=words):
        result_of(create_student(teacher, bank, shape_of(kind), depth=2, folder=tmp_path))
    assert teacher.forwards == 0 and not list(tmp_path.iterdir())


# ---- what is cut from it


@kinds
@pytest.mark.parametrize("renoised", [0, 2])
def test_every_probed_state_keeps_the_pictures_that_it_was_sampled_with(kind, renoised):
    shape, each = shape_of(kind), 2 + renoised
    bank = picture_bank(kind, 4, shape, tokens=5)
    teacher = CountingTeacher(random_wan(depth=1, **FIELDS[kind]), shift=3.0)
    probe = result_of(make_probe(teacher, bank, shape, seed=0, count=4 * each, cfg=3.0, each=2, renoised=renoised))
    order = []
    for told in (probe.cond[i:i + 1] for i in range(len(probe))):
        [which] = [i for i, context in enumerate(bank.contexts) if torch.equal(told.context[0, :len(context)], context)]
        order.append(which)
        for name in TOLD[kind]:
            assert torch.equal(getattr(told, name)[0], getattr(bank.shown[which], name).float())
    assert order == [which for which in order[::each] for _ in range(each)] and sorted(order[::each]) == [0, 1, 2, 3]
    if "given" in TOLD[kind]:
        on_path = [i for i in range(len(probe)) if i % each < 2]
        assert torch.equal(probe.x[on_path][:, :, :1], probe.cond.given[on_path])


@kinds
def test_a_walk_through_an_uncut_start_hands_on_what_the_teacher_does(kind):
    shape = shape_of(kind)
    teacher = ModuleTeacher(random_wan(depth=3, **FIELDS[kind]), shift=3.0)
    probe = result_of(make_probe(teacher, picture_bank(kind, 2, shape), shape, seed=0, count=4, cfg=3.0))
    plan = CompressionPlan(keep=(0, 1, 2), ffn_dim=256, method="given", teacher_layers=3, teacher_ffn_dim=256)
    walk = Walk(teacher.module.state_dict().__getitem__, plan, teacher, probe)
    with torch.no_grad():
        _, features = probe.cond.asked(teacher.module, probe.x, probe.sigma, return_features=True)
    for block in range(3):
        walk.enter(block)
        walk.advance()
        assert (walk.hidden.float() - features[block]).abs().max() < 2e-3 * features[block].abs().max()        # kept in float16


@pytest.fixture
def few_states(monkeypatch):
    monkeypatch.setattr(build, "MOST_HEALING", 48)
    monkeypatch.setattr(blockwise, "TOKENS_A_STEP", 96)
    monkeypatch.setattr(build, "DEPTH_STATES", 4)
    monkeypatch.setattr(build, "MOST_STATES", 16)
    monkeypatch.setattr(build, "HELD_OUT", 4)


@pytest.mark.parametrize("kind", ["2.1 I2V", "TI2V"])
@pytest.mark.parametrize("request_", [dict(refit="least squares"), dict(block_steps=25), dict(ffn_dim=128, method="spaced"), dict(method="greedy")], ids=str)
def test_a_start_that_makes_up_for_what_is_gone_is_nearer_than_the_plain_cut(tmp_path, few_states, kind, request_):
    """Where blocks are chosen, the one that the plain cut keeps in the middle adds nothing."""
    shape, asked = shape_of(kind), {"depth": 3, "cfg": 3.0, "method": "interleaved", **request_}
    teacher = counting_teacher(depth=5, idle=[2] if "method" in request_ else [], **FIELDS[kind])
    bank = picture_bank(kind, 6, shape, tokens=5)
    handle, report = result_of(create_student(teacher, bank, shape, folder=tmp_path, **asked))
    measured = handle.card.measured
    assert measured["start_error"] < 0.95 * measured["plain_cut_error"] and f"{measured['start_error']:.1%}" in report
    assert handle.plan.keep == (0, 2, 4) or 2 not in handle.plan.keep and "method" in request_
    assert handle.config == teacher.config.resized(num_layers=3, ffn_dim=asked.get("ffn_dim", 256)) == WanLiteStudent.from_pretrained(handle.folder).wan
    forwards = teacher.forwards
    assert result_of(create_student(teacher, bank, shape, folder=tmp_path, **asked)) == (handle, report) and teacher.forwards == forwards
    other = with_shown(bank, pictures(kind, 6, shape, seed=1, tokens=5))
    assert next(create_student(teacher, other, shape, folder=tmp_path, **asked)).stage == "Probing the teacher"
