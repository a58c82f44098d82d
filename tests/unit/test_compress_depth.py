"""Probing a teacher, and choosing the blocks it can do without."""
from functools import partial

import pytest
import torch
from helpers_compress import SHAPE, counting_teacher, result_of
from helpers_tiny import random_bank

from wanlite_model import flow
from wanlite_model.compress.depth import DepthChoice, greedy_depth, least_influence
from wanlite_model.compress.importance import Probe, answers, make_probe, velocity_errors, without
from wanlite_model.compress.plan import interleaved
from wanlite_model.errors import WanLiteError
from wanlite_model.cond import Cond
from wanlite_model.teacher import guided_velocity


CHOOSERS = {"greedy": greedy_depth, "spaced": partial(greedy_depth, spaced=True), "influence": least_influence}
choosers = pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS)


def probe_of(teacher, count=8, seed=0, cfg=3.0, bank=None):
    return result_of(make_probe(teacher, bank or random_bank(), SHAPE, seed=seed, count=count, cfg=cfg))


def error_of(teacher, probe, keep):
    target = torch.cat(list(answers(teacher.velocity, probe)))
    skip = set(range(teacher.config.num_layers)) - set(keep)
    return torch.cat(list(velocity_errors(without(teacher, skip), probe, target))).mean().item()


def test_a_probe_sees_every_sigma_of_the_deployment_shift():
    probe = probe_of(counting_teacher(depth=2), count=11)
    assert len(probe) == 11
    every = flow.schedule(8, shift=3.0)[:-1]
    torch.testing.assert_close(probe[:8].sigma.sort(descending=True).values, every)
    torch.testing.assert_close(probe[3:].sigma.sort(descending=True).values, every)


def test_a_probe_walks_the_guided_path_of_its_prompt():
    teacher, bank = counting_teacher(depth=2), random_bank(1)
    probe = probe_of(teacher, count=2, bank=bank)
    positive, negative = bank.cond([0]), bank.negative_cond([0])
    x = probe.x[:1]                                                                 # rollout 0: its steps 0 and 4
    sigmas = flow.schedule(8, shift=3.0)
    x0_path = list(flow.euler_steps(lambda x, s: guided_velocity(teacher, x, s, positive, negative, 3.0), x, sigmas))
    torch.testing.assert_close(x0_path[4][0], probe.x[1:2])
    torch.testing.assert_close(probe.cond.context[:, :positive.context.shape[1]], positive.context.expand(2, -1, -1))


@pytest.mark.parametrize("renoised", [0, 1, 2])
def test_every_state_keeps_the_prompt_that_it_was_sampled_with(renoised):
    teacher, bank = counting_teacher(depth=1), random_bank(4)
    each = 2 + renoised
    probe = result_of(make_probe(teacher, bank, SHAPE, seed=0, count=4 * each, cfg=3.0, renoised=renoised))
    lengths = [int(context.abs().sum(-1).ne(0).sum()) for context in probe.cond.context]
    assert len(probe.x) == len(probe.sigma) == len(probe.cond.context) == 4 * each
    for rollout in range(4):
        contexts = probe.cond.context[rollout * each:(rollout + 1) * each]
        assert torch.equal(contexts, contexts[:1].expand_as(contexts))
    assert len({tuple(context[0].tolist()) for context in probe.cond.context}) == 4 and sorted(lengths) == sorted(each * [3, 4, 5, 3])


@pytest.mark.parametrize("change", [{"seed": 1}, {"cfg": 1.0}, {"bank": random_bank(4, seed=9)}])
def test_a_probe_depends_on_what_it_is_asked(change):
    teacher = counting_teacher(depth=2)
    assert torch.equal(probe_of(teacher).x, probe_of(teacher).x)
    assert not torch.equal(probe_of(teacher).x, probe_of(teacher, **change).x)


@pytest.mark.parametrize("shape", [(48, 1, 8, 8), (16, 1, 7, 8), (16, 1, 8, 3), (16, 0, 8, 8)])
def test_a_shape_the_teacher_does_not_take_is_one_sentence_before_any_forward(shape):
    teacher = counting_teacher(depth=2)
    with pytest.raises(WanLiteError, match="This teacher takes"):
        result_of(make_probe(teacher, random_bank(), shape, seed=0, count=2, cfg=3.0))
    assert teacher.forwards == 0


@choosers
def test_a_block_that_does_nothing_is_removed_first(choose):
    teacher = counting_teacher(depth=6, idle=[3])
    choice = result_of(choose(teacher, probe_of(teacher), depth=4))
    assert choice.removals[0] == (3, pytest.approx(0.0, abs=1e-6))
    assert len(choice.keep) == 4 and 3 not in choice.keep


@choosers
def test_a_protected_block_stays_even_when_it_does_nothing(choose):
    teacher = counting_teacher(depth=10, idle=[0, 1, 8, 9])
    choice = result_of(choose(teacher, probe_of(teacher), depth=8))
    assert {0, 1, 8, 9} <= set(choice.keep)
    assert not {0, 1, 8, 9} & {block for block, _ in choice.removals}


def test_lazy_scoring_chooses_what_scoring_everything_chooses_with_fewer_forwards():
    teacher = counting_teacher(depth=7, seed=3)
    probe, removed = probe_of(teacher), []
    teacher.forwards = 0
    choice = result_of(greedy_depth(teacher, probe, depth=4))
    lazy, teacher.forwards = teacher.forwards, 0
    for _ in range(3):
        candidates = [block for block in range(1, 6) if block not in removed]
        scores = [error_of(teacher, probe, set(range(7)) - {*removed, block}) for block in candidates]
        removed.append(candidates[scores.index(min(scores))])
    assert [block for block, _ in choice.removals] == removed
    assert lazy < teacher.forwards


def test_spaced_removal_leaves_neighbours_for_last():
    teacher = counting_teacher(depth=9, idle=[3, 4, 5])
    probe = probe_of(teacher)
    together, apart = (result_of(choose(teacher, probe, depth=6)) for choose in (CHOOSERS["greedy"], CHOOSERS["spaced"]))
    assert [block for block, _ in together.removals] == [3, 4, 5] and together.keep == (0, 1, 2, 6, 7, 8)
    removed = [block for block, _ in apart.removals]
    assert removed[:2] == [3, 5] and removed[2] in (1, 7)


def test_spaced_removal_takes_neighbours_where_nothing_else_is_left():
    teacher = counting_teacher(depth=5, idle=[2])
    choice = result_of(greedy_depth(teacher, probe_of(teacher), depth=3, spaced=True))
    assert choice.removals[0][0] == 2 and choice.removals[1][0] in (1, 3)


def test_influence_is_how_far_a_block_turns_its_tokens_on_average():
    teacher = counting_teacher(depth=6, seed=2)
    probe, turned = probe_of(teacher), {}

    def keep(block, given, answered):
        turned[block] = 1 - torch.cosine_similarity(given.double(), answered.double(), dim=-1).mean().item()

    taps = {f"blocks.{block}": partial(keep, block) for block in range(1, 5)}
    list(answers(lambda x, sigma, cond: teacher.velocity(x, sigma, cond, taps=taps), probe))         # 8 states share a forward
    choice = result_of(least_influence(teacher, probe, depth=3))
    assert choice.removals == tuple((block, pytest.approx(turned[block], rel=1e-3)) for block in sorted(turned, key=turned.get)[:3])


@choosers
def test_a_choice_says_how_many_forwards_it_took(choose, monkeypatch):
    monkeypatch.setattr("wanlite_model.compress.importance.TOKENS_AT_ONCE", 48)                     # 3 states share a forward
    teacher = counting_teacher(depth=6)
    probe = probe_of(teacher)
    teacher.states = 0
    choice = result_of(choose(teacher, probe, depth=4))
    assert choice.forwards == teacher.states > 0 and teacher.states % len(probe) == 0


def test_influence_takes_three_passes_however_many_blocks_there_are():
    for depth in (6, 12):
        teacher = counting_teacher(depth=depth)
        assert result_of(least_influence(teacher, probe_of(teacher), depth=4)).forwards == 3 * 8


@choosers
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_choice_is_never_worse_than_interleaved_on_its_probe(choose, seed):
    teacher = counting_teacher(depth=7, seed=seed)
    probe = probe_of(teacher)
    choice = result_of(choose(teacher, probe, depth=4))
    assert choice.error == pytest.approx(error_of(teacher, probe, choice.keep), rel=1e-5)
    assert choice.interleaved_error == pytest.approx(error_of(teacher, probe, interleaved(7, 4)), rel=1e-5)
    assert choice.error <= choice.interleaved_error


def test_interleaved_is_returned_where_greed_was_short_sighted():
    class Trap:
        """Removing 2 costs least alone, but then ruins whatever goes next; 1 and 3 together cost little."""
        config = counting_teacher(depth=5).config
        errors = {(2,): 0.1, (1,): 0.2, (3,): 0.2, (1, 2): 0.9, (2, 3): 0.9, (1, 3): 0.3, (): 0.0}

        def velocity(self, x, sigma, cond, *, skip=(), taps={}):
            return torch.ones_like(x) * (1 + self.errors[tuple(sorted(skip))])

    probe = Probe(x=torch.zeros(2, *SHAPE), sigma=torch.ones(2), cond=Cond(context=torch.zeros(2, 1, 4096)))
    choice = result_of(greedy_depth(Trap(), probe, depth=3))
    assert choice == DepthChoice(keep=(0, 2, 4), error=pytest.approx(0.3), interleaved_error=pytest.approx(0.3),
                                 removals=((2, pytest.approx(0.1)), (1, pytest.approx(0.9))), forwards=2 * (1 + 3 + 2 + 1))


def test_no_mode_is_held_while_the_caller_has_control():
    teacher = counting_teacher(depth=4)
    with torch.inference_mode():
        steps = make_probe(teacher, random_bank(), SHAPE, seed=0, count=4, cfg=3.0)
        for _ in range(3):
            next(steps)
            assert torch.is_inference_mode_enabled()
        steps.close()
        probe = probe_of(teacher, count=4)
    assert not any(tensor.is_inference() for tensor in (probe.x, probe.sigma, probe.cond.context))
    steps = greedy_depth(teacher, probe, depth=3)
    for _ in range(3):
        next(steps)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@choosers
def test_progress_comes_at_least_once_a_forward_and_never_passes_its_total(choose):
    teacher = counting_teacher(depth=6)
    probe = probe_of(teacher)
    teacher.forwards, last = 0, -1
    for told in choose(teacher, probe, depth=3):
        assert teacher.forwards <= 1 and last <= told.done <= told.total
        teacher.forwards, last = 0, told.done
    assert last == told.total


def test_an_answer_that_is_not_finite_is_one_sentence():
    teacher = counting_teacher(depth=4)
    probe = probe_of(teacher)
    target = torch.cat(list(answers(teacher.velocity, probe)))
    with pytest.raises(WanLiteError, match="not finite"):
        list(velocity_errors(lambda x, sigma, cond: x * float("nan"), probe, target))


def test_large_videos_go_through_one_at_a_time():
    seen = []
    probe = Probe(x=torch.zeros(3, 16, 5, 60, 104), sigma=torch.ones(3), cond=Cond(context=torch.zeros(3, 1, 4096)))

    def velocity(x, sigma, cond: Cond):
        seen.append(len(x))
        return x

    list(answers(velocity, probe))
    assert seen == [1, 1, 1]
