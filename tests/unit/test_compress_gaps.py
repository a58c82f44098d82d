"""What the removed blocks added, folded into the cross attention of the block after the gap."""
import pytest
import torch
from helpers_compress import SHAPE, counting_teacher, result_of
from helpers_tiny import random_bank

from wanlite_model.compress.apply import start_student
from wanlite_model.compress.gaps import refit_gaps, refitted
from wanlite_model.compress.importance import answers, make_probe, velocity_errors
from wanlite_model.compress.plan import CompressionPlan
from wanlite_model.teacher import ModuleTeacher
from wanlite_model.transformer import WanLiteStudent

REFITS = ("none", "mean", "least squares")


def probe_of(teacher, seed, count=32):
    return result_of(make_probe(teacher, random_bank(8), SHAPE, seed=seed, count=count, cfg=3.0, each=1, renoised=1))


def plan_of(teacher, keep):
    layers, ffn_dim = teacher.config.num_layers, teacher.config.ffn_dim
    return CompressionPlan(keep=keep, ffn_dim=ffn_dim, method="given", teacher_layers=layers, teacher_ffn_dim=ffn_dim)


def start(teacher, keep, refit="none", probe=None):
    """The start's tensors, refitted on the probe."""
    plan = plan_of(teacher, keep)
    tensors = {name: tensor.clone() for name, tensor in start_student(teacher.weights(), plan)}
    if refit != "none":
        result_of(refit_gaps(teacher, tensors.__getitem__, plan, probe or probe_of(teacher, seed=1), refit, tensors.update))
    return tensors


def error_of(teacher, tensors, probe):
    module = WanLiteStudent.from_wan(teacher.config.resized(num_layers=sum(name.endswith("self_attn.q.bias") for name in tensors),
                                                            ffn_dim=teacher.config.ffn_dim), device="meta")
    module.load_state_dict(tensors, assign=True)
    target = torch.cat(list(answers(teacher.velocity, probe)))
    return torch.cat(list(velocity_errors(ModuleTeacher(module, shift=3.0).velocity, probe, target))).mean().item()


def silent(layer):
    for parameter in layer.parameters():
        parameter.zero_()


def replaceable(teacher, block, by):
    """`block` becomes one whose work `by`, the next one kept, can do: it adds W a + b alone, with an `a` that is the other's too.

    Where queries are constant, `a` depends on the text and on nothing that a removed block did.
    """
    with torch.no_grad():
        mine, other = teacher.module.blocks[block], teacher.module.blocks[by]
        for layer in (mine.self_attn.o, mine.ffn[2], other.self_attn.o):
            silent(layer)
        other.cross_attn.q.weight.zero_()
        out = {name: value.clone() for name, value in mine.cross_attn.o.state_dict().items()}
        mine.cross_attn.load_state_dict(other.cross_attn.state_dict())
        mine.cross_attn.o.load_state_dict(out)
        mine.cross_attn.o.bias.add_(torch.randn(128))


def constant(teacher, block, by):
    """`block` becomes one that adds the same to every token of every state, which is returned."""
    replaceable(teacher, block, by)
    with torch.no_grad():
        teacher.module.blocks[block].cross_attn.o.weight.zero_()
    return teacher.module.blocks[block].cross_attn.o.bias.detach().clone()


@pytest.mark.parametrize("refit", ["mean", "least squares"])
def test_what_a_removed_block_always_adds_is_taken_over(refit):
    teacher = counting_teacher(depth=5)
    constant(teacher, 2, by=3)
    unseen = probe_of(teacher, seed=9)
    cut, refitted_start = (error_of(teacher, start(teacher, (0, 1, 3, 4), name), unseen) for name in ("none", refit))
    assert cut > 0.1 and refitted_start < 0.01 * cut


def test_what_a_removed_block_does_with_the_text_is_taken_over_by_least_squares():
    teacher = counting_teacher(depth=5)
    replaceable(teacher, 2, by=3)
    unseen = probe_of(teacher, seed=9)
    none, mean, squares = (error_of(teacher, start(teacher, (0, 1, 3, 4), refit), unseen) for refit in REFITS)
    assert squares < 0.5 * mean < 0.5 * none and squares < 0.05 * none


@pytest.mark.parametrize("refit", ["mean", "least squares"])
def test_a_later_gap_finds_the_earlier_one_made_up_for(refit):
    """Else the second would take over again what the first one did."""
    teacher = counting_teacher(depth=6)
    first, second = constant(teacher, 1, by=2), constant(teacher, 3, by=4)
    own, start_ = teacher.module.state_dict(), start(teacher, (0, 2, 4, 5), refit)
    for mine, theirs, added in ((1, 2, first), (2, 4, second)):
        moved = start_[f"blocks.{mine}.cross_attn.o.bias"] - own[f"blocks.{theirs}.cross_attn.o.bias"]
        torch.testing.assert_close(moved, added, rtol=0.01, atol=0.02)
    unseen = probe_of(teacher, seed=9)
    assert error_of(teacher, start_, unseen) < 0.02 * error_of(teacher, start(teacher, (0, 2, 4, 5)), unseen)


def test_only_the_layer_after_each_gap_changes_and_of_it_only_the_bias_by_the_mean():
    teacher = counting_teacher(depth=7, dtype=torch.bfloat16)
    keep = (1, 2, 4, 5)                                         # gaps before 1 and 4, and behind 5, where no block is left to take over
    cut, probe = start(teacher, keep), probe_of(teacher, seed=1, count=4)
    for refit, leaves in (("mean", {"bias"}), ("least squares", {"bias", "weight"})):
        tensors = start(teacher, keep, refit, probe)
        changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, cut[name])}
        assert changed == {f"blocks.{j}.cross_attn.o.{leaf}" for j in (0, 2) for leaf in leaves}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_where_no_block_follows_a_gap_nothing_is_asked_or_changed():
    teacher = counting_teacher(depth=4)
    probe = probe_of(teacher, seed=1)
    for keep in ((0, 1, 2, 3), (0, 1)):
        teacher.forwards = 0
        tensors, cut = start(teacher, keep, "least squares", probe), start(teacher, keep)
        assert teacher.forwards == 0 and all(torch.equal(tensor, cut[name]) for name, tensor in tensors.items())


def test_the_refit_is_the_least_squares_solution_and_a_strong_ridge_the_mean_alone():
    torch.manual_seed(0)
    a = torch.randn(400, 6).double() @ torch.randn(6, 6).double() + torch.randn(6)
    missing = a @ torch.randn(6, 6).double() + torch.randn(400, 6) + 3
    weight, bias, rows = torch.randn(6, 6).double(), torch.randn(6).double(), torch.cat((a, missing), dim=1)
    told = {"mean": rows.mean(0), "covariance": rows.T.cov(correction=0)}
    expected = torch.linalg.lstsq(torch.cat((a, torch.ones(400, 1)), dim=1), a @ weight.T + bias + missing).solution
    fitted = refitted(weight, bias, **told, ridge=1e-12)
    torch.testing.assert_close(fitted, (expected[:-1].T, expected[-1]), rtol=1e-5, atol=1e-6)
    strong, mean = refitted(weight, bias, **told, ridge=1e9), refitted(weight, bias, **told, ridge=None)
    torch.testing.assert_close(strong, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean, (weight, bias + missing.mean(0)))


def test_the_memory_that_a_refit_may_take_changes_the_forwards_and_not_the_result(monkeypatch):
    teacher = counting_teacher(depth=6)
    probe, found, forwards = probe_of(teacher, seed=1), [], []
    for memory in (2 << 30, 1):
        monkeypatch.setattr("wanlite_model.compress.walk.MEMORY", memory)
        teacher.states = 0
        found.append(start(teacher, (0, 2, 4, 5), "least squares", probe))
        forwards.append(teacher.states // len(probe))
    assert forwards == [1, 2]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_teacher_has_no_hooks_after_a_refit_that_was_closed():
    teacher = counting_teacher(depth=4)
    plan, tensors = plan_of(teacher, (0, 2, 3)), start(teacher, (0, 2, 3))
    steps = refit_gaps(teacher, tensors.__getitem__, plan, probe_of(teacher, seed=1), "mean", tensors.update)
    next(steps), next(steps)
    steps.close()
    assert not any(module._forward_hooks for module in teacher.module.modules())
