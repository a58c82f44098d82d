"""Each lever takes less memory, trains as well, and goes on where another left off."""
import pytest
import torch
from helpers_distill import Setting, same, until
from helpers_tiny import random_bank

from wanlite_model.config import WanConfig
from wanlite_model.distill import learner
from wanlite_model.distill.budget import GIB, Machine, plan, predicted
from wanlite_model.distill.events import Planned, Step
from wanlite_model.distill.job import DistillJob, Recipe
from wanlite_model.distill.levers import Levers, LeverSettings, ladder
from wanlite_model.errors import WanLiteError

WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_layers=30)
AMPLE = Machine(device=10**15, ram=10**15, run_disk=10**15, cache_disk=10**15)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("levers"))


def job(rank=0, frames=5, **recipe):
    return DistillJob(student="s", teacher="t", prompts="p", shape=(16, frames, 60, 104), shift=5.0, steps=10, recipe=Recipe(rank=rank, **recipe))


def rungs(frozen, device_type="cuda", **settings):
    return list(ladder(LeverSettings(**settings), frozen=frozen, blocks=30, device_type=device_type))


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
def test_each_rung_of_a_1_3b_takes_less_of_the_card(rank, recipe):
    bank = random_bank(1)
    peaks = [predicted(job(rank, **recipe), WAN_1_3B, levers, "cuda", bank).device / GIB for levers in rungs(rank > 0)]
    assert all(a > b for a, b in zip(peaks, peaks[1:])), peaks
    assert peaks[0] > 25 and peaks[-1] < (6 if rank == 0 else 3), peaks


def test_the_first_rung_that_fits_is_taken_and_a_resumed_run_keeps_its_own():
    bank, frozen = random_bank(1), job(32)
    def chosen(gib, **more):
        machine = Machine(device=int(gib * GIB), ram=64 * GIB, run_disk=AMPLE.run_disk, cache_disk=AMPLE.cache_disk)
        return plan(frozen, WAN_1_3B, machine, torch.device("cpu"), bank, **more)
    assert chosen(80).rungs[0] == Levers() and chosen(12).rungs[0] == Levers(checkpointing=True)
    assert chosen(80, noted=Levers(checkpointing=True)).rungs[0] == Levers(checkpointing=True)


@pytest.mark.parametrize(("rank", "on"), [(0, {"checkpointing": True}), (4, {"checkpointing": True}), (4, {"frozen_float8": True}),
                                          (0, {"optimizer_8bit": True}), (0, {"optimizer_8bit": True, "gradient_release": True})], ids=str)
def test_a_lever_trains_as_well_and_a_run_goes_on_with_another(setting, rank, on):
    name, recipe = f"{rank} {sorted(on)}", {"rank": rank, "learning_rate": 2e-3 if rank else 5e-4, "ema_decay": 0.9}
    with_it, without = (setting.job(steps=30, recipe=recipe, levers=LeverSettings(**levers)) for levers in (on, {}))
    *_, plain = setting.events(without, f"plain {rank}")
    events = list(setting.events(with_it, name))
    assert next(event for event in events if isinstance(event, Planned)).budget.rungs[0] == Levers(**on)
    best, other = (min(error for _, error in end.evaluations) for end in (events[-1], plain))
    assert best < 1.1 * other < 1.1 * plain.plain_cut
    until(setting.events(without, f"{name} then none"), lambda event: isinstance(event, Step) and event.step == 10)
    until(setting.events(with_it, f"{name} then none"), lambda event: isinstance(event, Step) and event.step == 20)
    *_, mixed = setting.events(without, f"{name} then none")
    assert min(error for _, error in mixed.evaluations) < 1.15 * other
    until(setting.events(with_it, f"{name} halves"), lambda event: isinstance(event, Step) and event.step == 11)
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
