"""Each lever takes less memory, trains as well, and goes on where another left off."""
import gc
import math
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers_distill import Setting, same, until
from helpers_pictures import picture_bank, shape_of
from helpers_tiny import random_bank

from wanlite_model.config import WanConfig
from wanlite_model.distill import learner
from wanlite_model.distill.budget import AVERAGED, GIB, Machine, Peaks, plan, predicted, spilled, step_seconds
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.distill.events import Planned, Step
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.levers import Levers, LeverSettings, ladder
from wanlite_model.distill.optim import WeightAverage
from wanlite_model.distill.trainer import Run
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.keymap import wan_shapes

WIDE = WanConfig(dim=1536, ffn_dim=8960, num_layers=8)               # the 1.3B's, a quarter of its blocks


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("levers"))


def job(rank=0, frames=5, **recipe):
    return DistillJob(student="s", teacher="t", prompts="p", shape=(16, frames, 60, 104), shift=5.0, steps=10, recipe=Recipe(rank=rank, **recipe))


def rungs(frozen, device_type="cuda", blocks=30, **settings):
    return list(ladder(LeverSettings(**settings), frozen=frozen, blocks=blocks, device_type=device_type))


def test_the_ladder_pulls_one_lever_more_on_each_rung_and_only_those_that_do_something():
    assert rungs(False) == [Levers(), Levers(checkpointing=True), Levers(checkpointing=True, checkpoints_on_cpu=True),
                            Levers(checkpointing=True, checkpoints_on_cpu=True, optimizer_8bit=True),
                            Levers(checkpointing=True, checkpoints_on_cpu=True, optimizer_8bit=True, gradient_release=True)]
    assert [levers.swapped_blocks for levers in rungs(True)] == [0, 0, 0, 0, 8, 15, 22, 30] and rungs(True)[3].frozen_float8
    assert rungs(True, "cpu") == [Levers(), Levers(checkpointing=True), Levers(checkpointing=True, frozen_float8=True)]


def test_what_a_user_sets_stays_so_on_every_rung():
    assert rungs(False, optimizer_8bit=False)[-1] == Levers(checkpointing=True, checkpoints_on_cpu=True)
    assert all(levers.frozen_float8 for levers in rungs(True, frozen_float8=True))
    assert rungs(True, swapped_blocks=99) [0] == Levers(checkpointing=True, swapped_blocks=30)
    assert rungs(True, checkpointing=False) == [Levers(), Levers(frozen_float8=True)]
    with pytest.raises(WanLiteError, match="swapped_blocks is on and checkpointing is off"):
        LeverSettings(checkpointing=False, swapped_blocks=3)
    with pytest.raises(WanLiteError, match="below 0"):
        LeverSettings(gpu_gib=-1)


@pytest.mark.parametrize(("rank", "recipe"), [(0, {"optimizer": "Muon"}), (0, {}), (32, {})], ids=["muon", "adamw", "lora"])
def test_each_rung_takes_less_of_the_card(rank, recipe):
    bank = random_bank(1)
    peaks = [predicted(job(rank, frames=13, **recipe), WIDE, levers, "cuda", bank).device / GIB for levers in rungs(rank > 0, blocks=8)]
    assert all(a > b for a, b in zip(peaks, peaks[1:])) and peaks[0] > 4 * peaks[-1], peaks


def test_the_first_rung_that_fits_is_taken_and_a_resumed_run_keeps_its_own():
    def chosen(gib, **more):
        machine = Machine(device=int(gib * GIB), ram=64 * GIB, run_disk=10**15, cache_disk=10**15)
        return plan(job(32), WIDE, machine, torch.device("cpu"), random_bank(1), **more).rungs[0]
    assert chosen(80) == Levers() and chosen(6) == Levers(checkpointing=True)
    assert chosen(80, noted=Levers(checkpointing=True)) == Levers(checkpointing=True)


@pytest.mark.parametrize(("kind", "fewest"), [("2.2 I2V", 1), ("TI2V", 5)])
def test_a_clip_with_pictures_that_does_not_fit_is_refused_with_a_length_that_does(kind, fewest):
    """The pictures are of the whole length; 5 frames are the least of which one latent is given and another made."""
    shape = shape_of(kind, frames=9, size=32)
    bank = picture_bank(kind, 1, shape)
    config = WanConfig(model_type=kind.split()[-1].lower(), dim=128, ffn_dim=256, num_layers=2, in_dim=36 if kind == "2.2 I2V" else 48, out_dim=shape[0])
    asked = DistillJob(student="s", teacher="t", prompts="p", shape=shape, shift=3.0, steps=1, recipe=Recipe(rank=4))

    rung = list(ladder(asked.levers, frozen=True, blocks=config.num_layers, device_type="cpu"))[-1]
    takes, lengths = predicted(asked, config, rung, "cpu", bank).device, []
    for share in (0.25, 0.4, 0.6, 0.8, 0.95):
        machine = Machine(device=int(share * takes), ram=64 * GIB, run_disk=10**15, cache_disk=10**15)
        with pytest.raises(WanLiteError, match="This job takes") as refused:
            plan(asked, config, machine, torch.device("cpu"), bank)
        lengths += map(int, re.findall(r"length to (\d+) frames: that fits", str(refused.value)))
    assert lengths == sorted(lengths) and lengths[0] == fewest and 9 < lengths[-1] < 33


@pytest.mark.parametrize(("rank", "on"), [(0, {"checkpointing": True}), (4, {"checkpointing": True}), (4, {"frozen_float8": True}),
                                          (0, {"optimizer_8bit": True}), (0, {"optimizer_8bit": True, "gradient_release": True})], ids=str)
def test_a_lever_trains_as_well_and_a_run_goes_on_with_another(setting, rank, on):
    name, recipe = f"{rank} {sorted(on)}", {"rank": rank, "learning_rate": 2e-3 if rank else 5e-4, "ema_decay": 0.9}
    with_it, without = (setting.job(steps=16, recipe=recipe, levers=LeverSettings(**levers)) for levers in (on, {}))
    *_, plain = setting.events(without, f"plain {rank}")
    events = list(setting.events(with_it, name))
    assert next(event for event in events if isinstance(event, Planned)).budget.rungs[0] == Levers(**on)
    best, other = (min(error for _, error in end.evaluations) for end in (events[-1], plain))
    assert best < 1.1 * other and other < plain.plain_cut
    until(setting.events(without, f"{name} then none"), lambda event: isinstance(event, Step) and event.step == 5)
    until(setting.events(with_it, f"{name} then none"), lambda event: isinstance(event, Step) and event.step == 10)
    *_, mixed = setting.events(without, f"{name} then none")
    assert min(error for _, error in mixed.evaluations) < 1.15 * other
    until(setting.events(with_it, f"{name} halves"), lambda event: isinstance(event, Step) and event.step == 7)
    list(setting.events(with_it, f"{name} halves"))
    assert same(setting.state(name), setting.state(f"{name} halves"))
    if "checkpointing" in on:
        assert same(setting.state(name), setting.state(f"plain {rank}"))


def test_with_gradients_released_a_batch_in_parts_moves_the_weights_with_each_part(setting, monkeypatch):
    monkeypatch.setattr(learner, "TOKENS_A_PASS", 16)               # two states of eight tokens
    levers = LeverSettings(optimizer_8bit=True, gradient_release=True)
    job = setting.job(steps=30, recipe={"learning_rate": 5e-4, "ema_decay": 0.9}, levers=levers)
    *_, end = setting.events(job, "parts")
    assert min(error for _, error in end.evaluations) < 0.8 * end.plain_cut
    steps = {int(value) for name, value in setting.state("parts").items() if name.startswith("step.")}
    assert steps == {60}


def test_a_step_that_broke_off_with_gradients_released_is_not_saved(setting, monkeypatch):
    from wanlite_model.distill.eightbit import AdamW8
    job = setting.job(levers=LeverSettings(optimizer_8bit=True, gradient_release=True, checkpointing=True))
    list(setting.events(job, "unbroken"))
    until(setting.events(job, "broken"), lambda event: isinstance(event, Step) and event.step == 3)
    exact, calls = AdamW8.step_parameter, []

    def fails(self, parameter):
        calls.append(0)
        if len(calls) == 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return exact(self, parameter)

    monkeypatch.setattr(AdamW8, "step_parameter", fails)
    with pytest.raises(WanLiteError, match="up to the last checkpoint is kept"):
        list(setting.events(job, "broken"))
    monkeypatch.undo()
    list(setting.events(job, "broken"))
    assert same(setting.state("unbroken"), setting.state("broken"))


def test_the_teacher_makes_as_much_room_as_is_needed_before_each_try(setting, monkeypatch):
    asked, device = [], SimpleNamespace(type="cuda")

    def room(peaks, **levers):
        return Run._room(SimpleNamespace(budget=SimpleNamespace(peaks=peaks), job=setting.job(levers=LeverSettings(**levers)), teacher=SimpleNamespace(device=device)))

    peaks = Peaks(device=920, ram=0, saved=0)
    assert room(peaks) == pytest.approx(1000) and room(None) == room(peaks, gpu_gib=8) == math.inf
    device.type = "cpu"
    assert room(peaks) == math.inf
    monkeypatch.setattr(setting.teacher, "release", lambda needed: asked.append(needed))
    list(setting.events(name="room"))
    assert asked == [math.inf]


def test_the_time_of_a_step_is_that_of_its_arithmetic_and_of_an_average_elsewhere():
    plain, twice, eight = (step_seconds(job(), WIDE, levers, 1e14, "cuda") for levers in (Levers(), Levers(checkpointing=True), Levers(optimizer_8bit=True)))
    assert twice == pytest.approx(plain * 4 / 3) and eight - plain == pytest.approx(AVERAGED * sum(map(math.prod, wan_shapes(WIDE).values())))
    assert step_seconds(job(), WIDE, Levers(optimizer_8bit=True), 1e14, "cpu") == plain


def test_a_base_in_fp32_takes_what_it_takes():
    half, whole = (predicted(job(32), WIDE, Levers(checkpointing=True), "cuda", random_bank(1), stored=dtype).device for dtype in (torch.bfloat16, torch.float32))
    assert whole - half == pytest.approx(2 * sum(map(math.prod, wan_shapes(WIDE).values())), rel=0.1)


def test_steps_in_the_computers_memory_are_told_from_slow_ones():
    assert not spilled([1.0, 1.1, 0.9, 5.0, 1.0, 1.0, 1.9], 1.0)          # one that was held up
    assert spilled([1.0, 1.0, 1.0, 2.1, 2.2, 2.1, 2.3, 2.1], 1.0)
    assert spilled([50.0] * 5, 1.0) and not spilled([50.0] * 4, 1.0) and not spilled([4.0] * 9, 1.0)


def test_an_average_of_bf16_weights_goes_on_following_after_an_evaluation():
    weight = torch.nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    average = WeightAverage({"w": weight}, 0.99)
    with average.in_place():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, torch.ones(4, dtype=torch.bfloat16))
    weight.data.fill_(1.1)
    for _ in range(1000):
        average.update(1000)
    assert average.values["w"].dtype == torch.float32
    torch.testing.assert_close(average.values["w"], weight.float(), rtol=1e-3, atol=0)
    before = average.values["w"].clone()
    weight.data.fill_(2.0)
    with average.in_place():
        torch.testing.assert_close(weight.float(), before, rtol=1e-2, atol=0)
    assert torch.equal(average.values["w"], before) and torch.equal(weight.float(), torch.full((4,), 2.0))


def test_weights_that_move_within_backward_are_freed_with_their_run(setting):
    levers = LeverSettings(optimizer_8bit=True, gradient_release=True)
    running = Run(setting.job(levers=levers), RunFolder(setting.folder / "freed"), setting.folder / "cache", setting.teacher, setting.student, setting.bank, None,
                  lambda: False, False)
    list(running.events())
    weights = [weakref.ref(value) for value in running.state.trained.values()]
    del running
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_a_torch_that_cannot_be_run_dry_still_trains_and_says_so(setting, monkeypatch, caplog):
    def cannot(*_):
        raise AttributeError("no such private thing")
    monkeypatch.setattr("wanlite_model.distill.budget.predicted", cannot)
    events = list(setting.events(setting.job(steps=2), "not dry"))
    assert "could not be predicted" in events[0].told and "no such private thing" in caplog.text
