"""Probing a teacher, and choosing the blocks it can do without."""
import pytest
import torch
from helpers_compress import SHAPE, counting_teacher, result_of
from helpers_tiny import random_bank

from wanlite_model import flow
from wanlite_model.compress.importance import DepthChoice, Probe, answers, greedy_depth, make_probe, velocity_errors, without
from wanlite_model.compress.plan import interleaved
from wanlite_model.errors import WanLiteError
from wanlite_model.teacher import Cond, guided_velocity


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
    positive, negative = bank.cond([0]), bank.negative_cond(1)
    x = probe.x[:1]                                                                 # rollout 0: its steps 0 and 4
    sigmas = flow.schedule(8, shift=3.0)
    x0_path = list(flow.euler_steps(lambda x, s: guided_velocity(teacher, x, s, positive, negative, 3.0), x, sigmas))
    torch.testing.assert_close(x0_path[4][0], probe.x[1:2])
    torch.testing.assert_close(probe.context[:, :positive.context.shape[1]], positive.context.expand(2, -1, -1))


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


def test_a_teacher_that_also_reads_a_picture_is_refused():
    with pytest.raises(WanLiteError, match="text-to-video"):
        probe_of(counting_teacher(depth=2, model_type="i2v", in_dim=36))


def test_a_block_that_does_nothing_is_removed_first():
    teacher = counting_teacher(depth=6, idle=[3])
    choice = result_of(greedy_depth(teacher, probe_of(teacher), depth=4))
    assert choice.removals[0] == (3, 0.0)
    assert len(choice.keep) == 4 and 3 not in choice.keep


def test_a_protected_block_stays_even_when_it_does_nothing():
    teacher = counting_teacher(depth=10, idle=[0, 1, 8, 9])
    choice = result_of(greedy_depth(teacher, probe_of(teacher), depth=8))
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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_choice_is_never_worse_than_interleaved_on_its_probe(seed):
    teacher = counting_teacher(depth=7, seed=seed)
    probe = probe_of(teacher)
    choice = result_of(greedy_depth(teacher, probe, depth=4))
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

    probe = Probe(x=torch.zeros(2, *SHAPE), sigma=torch.ones(2), context=torch.zeros(2, 1, 4096))
    choice = result_of(greedy_depth(Trap(), probe, depth=3))
    assert choice == DepthChoice(keep=(0, 2, 4), error=pytest.approx(0.3), interleaved_error=pytest.approx(0.3),
                                 removals=((2, pytest.approx(0.1)), (1, pytest.approx(0.9))))


def test_no_mode_is_held_while_the_caller_has_control():
    teacher = counting_teacher(depth=4)
    with torch.inference_mode():
        steps = make_probe(teacher, random_bank(), SHAPE, seed=0, count=4, cfg=3.0)
        for _ in range(3):
            next(steps)
            assert torch.is_inference_mode_enabled()
        steps.close()
        probe = probe_of(teacher, count=4)
    assert not any(tensor.is_inference() for tensor in (probe.x, probe.sigma, probe.context))
    steps = greedy_depth(teacher, probe, depth=3)
    for _ in range(3):
        next(steps)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_progress_comes_at_least_once_a_forward_and_never_passes_its_total():
    teacher = counting_teacher(depth=6)
    probe = probe_of(teacher)
    teacher.forwards, last = 0, -1
    for told in greedy_depth(teacher, probe, depth=3):
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
    probe = Probe(x=torch.zeros(3, 16, 5, 60, 104), sigma=torch.ones(3), context=torch.zeros(3, 1, 4096))

    def velocity(x, sigma, cond: Cond):
        seen.append(len(x))
        return x

    list(answers(velocity, probe))
    assert seen == [1, 1, 1]
