"""The student's tensors: whole blocks, fewer FFN neurons, and the refit behind them."""
import pytest
import torch
from helpers_compress import SHAPE, counting_teacher, result_of
from helpers_tiny import random_bank

from wanlite_model.compress.apply import plain_cut, start_student
from wanlite_model.compress.ffn import FfnCut, Moments, cut_ffn, refit
from wanlite_model.compress.importance import answers, make_probe, velocity_errors
from wanlite_model.compress.plan import CompressionPlan, interleaved
from wanlite_model.compress.shelf import Shelf
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.keymap import wan_shapes
from wanlite_model.teacher import ModuleTeacher
from wanlite_model.transformer import WanLiteStudent


def probe_of(teacher, count=24):
    return result_of(make_probe(teacher, random_bank(), SHAPE, seed=0, count=count, cfg=3.0))


def plan_of(teacher, keep=None, ffn_dim=None):
    config = teacher.config
    return CompressionPlan(keep=tuple(range(config.num_layers)) if keep is None else keep, ffn_dim=ffn_dim or config.ffn_dim,
                           method="given", teacher_layers=config.num_layers, teacher_ffn_dim=config.ffn_dim)


def student_of(weights, config):
    module = WanLiteStudent.from_wan(config, device="meta")
    module.load_state_dict(dict(weights), assign=True)
    return ModuleTeacher(module, shift=3.0)


def velocities(model, probe, **options):
    return torch.cat(list(answers(lambda x, sigma, cond: model.velocity(x, sigma, cond, **options), probe)))


def error_of(weights, config, probe, target):
    return torch.cat(list(velocity_errors(student_of(weights, config).velocity, probe, target))).mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "mixed"])
def test_pruning_nothing_is_the_teacher_bit_for_bit(dtype):
    teacher = counting_teacher(depth=3, dtype=torch.float32 if dtype == "mixed" else dtype)
    if dtype == "mixed":
        teacher.module.blocks.bfloat16()
    own = teacher.module.state_dict()
    for stream in (start_student(teacher.weights(), plan_of(teacher)), plain_cut(teacher, teacher.config)):
        started = dict(stream)
        assert started.keys() == own.keys()
        for name, tensor in started.items():
            assert tensor.dtype == own[name].dtype and torch.equal(tensor, own[name]), name


def test_a_start_computes_what_the_teacher_computes_without_the_removed_blocks():
    teacher = counting_teacher(depth=5)
    probe, keep = probe_of(teacher, 4), (0, 2, 4)
    started = student_of(start_student(teacher.weights(), plan_of(teacher, keep)), plan_of(teacher, keep).student_config(teacher.config))
    torch.testing.assert_close(velocities(started, probe), velocities(teacher, probe, skip={1, 3}))


def test_the_plain_cut_is_interleaved_blocks_and_first_neurons():
    teacher = counting_teacher(depth=6)
    config = teacher.config.resized(num_layers=4, ffn_dim=100)
    cut, own, keep = dict(plain_cut(teacher, config)), teacher.module.state_dict(), interleaved(6, 4)
    assert {name: tuple(tensor.shape) for name, tensor in cut.items()} == wan_shapes(config)
    for mine, theirs in enumerate(keep):
        assert torch.equal(cut[f"blocks.{mine}.ffn.0.weight"], own[f"blocks.{theirs}.ffn.0.weight"][:100])
        assert torch.equal(cut[f"blocks.{mine}.ffn.2.weight"], own[f"blocks.{theirs}.ffn.2.weight"][:, :100])
        assert torch.equal(cut[f"blocks.{mine}.self_attn.q.weight"], own[f"blocks.{theirs}.self_attn.q.weight"])


def test_moments_are_the_mean_and_the_covariance():
    hidden, moments = torch.randn(3, 50, 7) * torch.arange(1.0, 8) + 100, Moments()
    for part in hidden:
        moments(part.unsqueeze(0), part)
    mean, covariance = moments.finish()
    rows = hidden.flatten(0, 1).double()
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(covariance, rows.T.cov(correction=0), rtol=1e-4, atol=1e-3)


def test_the_refit_is_the_least_squares_solution():
    torch.manual_seed(0)
    hidden = torch.randn(400, 24).double() @ torch.randn(24, 24).double() + torch.randn(24)
    weight, bias = torch.randn(5, 24).double(), torch.randn(5).double()
    cut = refit(weight=weight, bias=bias, mean=hidden.mean(0), covariance=hidden.T.cov(correction=0), ffn_dim=10, ridge=1e-12)
    kept = torch.cat((hidden[:, cut.kept], torch.ones(400, 1)), dim=1)
    expected = torch.linalg.lstsq(kept, hidden @ weight.T + bias).solution
    torch.testing.assert_close(cut.weight, expected[:-1].T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut.bias, expected[-1], rtol=1e-5, atol=1e-6)
    score = hidden.std(0) * weight.norm(dim=0)
    assert cut.kept.tolist() == sorted(score.argsort(descending=True)[:10].tolist())


def test_a_strong_ridge_is_the_plain_slice_not_zero():
    torch.manual_seed(0)
    hidden, weight = torch.randn(400, 24).double(), torch.randn(5, 24).double()
    cut = refit(weight=weight, bias=torch.zeros(5), mean=hidden.mean(0), covariance=hidden.T.cov(), ffn_dim=10, ridge=1e9)
    torch.testing.assert_close(cut.weight, weight[:, cut.kept], rtol=1e-6, atol=1e-6)


def test_refitting_beats_slicing_on_states_it_has_not_seen(tmp_path):
    teacher = counting_teacher(depth=4)
    probe = probe_of(teacher, 40)
    seen, unseen = probe[:32], probe[32:]
    plan = plan_of(teacher, ffn_dim=128)
    cuts = result_of(cut_ffn(teacher, seen, plan.keep, 128, Shelf(tmp_path / "shelf")))
    own = teacher.module.state_dict()
    sliced = {block: FfnCut(kept=cut.kept, weight=own[f"blocks.{block}.ffn.2.weight"][:, cut.kept], bias=own[f"blocks.{block}.ffn.2.bias"])
              for block, cut in cuts.items()}
    config, target = plan.student_config(teacher.config), velocities(teacher, unseen)
    refitted, slice_only, plain = (error_of(start_student(teacher.weights(), plan, chosen), config, unseen, target)
                                   for chosen in (cuts, sliced, None))
    assert refitted < 0.9 * slice_only < 0.9 * plain


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_neurons_that_say_nothing_go_first_and_are_not_missed(level, tmp_path):
    """Silent ones, and those that always say the same: the bias says it for them."""
    teacher = counting_teacher(depth=2)
    quiet = torch.arange(0, 256, 4)
    with torch.no_grad():
        for block in teacher.module.blocks:
            block.ffn[0].weight[quiet] = 0
            block.ffn[0].bias[quiet] = level
    probe, plan = probe_of(teacher, 16), plan_of(teacher, ffn_dim=192)
    cuts = result_of(cut_ffn(teacher, probe, plan.keep, 192, Shelf(tmp_path / "shelf")))
    assert not any(set(cut.kept.tolist()) & set(quiet.tolist()) for cut in cuts.values())
    started = student_of(start_student(teacher.weights(), plan, cuts), plan.student_config(teacher.config))
    torch.testing.assert_close(velocities(started, probe), velocities(teacher, probe), rtol=1e-3, atol=1e-4)


def test_the_memory_bound_changes_the_forwards_and_not_the_result(tmp_path):
    teacher = counting_teacher(depth=4)
    probe, found, forwards = probe_of(teacher, 8), [], []
    for memory in (1, 2 * 4 * 256**2, 2 << 30):
        teacher.forwards = 0
        found.append(result_of(cut_ffn(teacher, probe, (0, 2, 3), 100, Shelf(tmp_path / str(memory)), memory=memory)))
        forwards.append(teacher.forwards)
    assert forwards == [3, 2, 1]
    for block in (0, 2, 3):
        assert all(torch.equal(other[block].weight, found[0][block].weight) for other in found)


def test_neurons_are_scored_with_the_removed_blocks_gone(tmp_path):
    teacher = counting_teacher(depth=4)
    probe = probe_of(teacher, 16)
    whole, alone = (result_of(cut_ffn(teacher, probe, keep, 128, Shelf(tmp_path / str(len(keep))))) for keep in ((0, 1, 2, 3), (0, 3)))
    assert torch.equal(whole[0].weight, alone[0].weight)
    assert not torch.equal(whole[3].weight, alone[3].weight)


def test_a_bf16_teacher_gives_bf16_cuts_in_inference_mode_too(tmp_path):
    teacher = counting_teacher(depth=2, dtype=torch.bfloat16)
    with torch.inference_mode():
        probe = probe_of(teacher, 8)
        cuts = result_of(cut_ffn(teacher, probe, (0, 1), 64, Shelf(tmp_path / "shelf")))
        started = dict(start_student(teacher.weights(), plan_of(teacher, ffn_dim=64), cuts))
    assert {tensor.dtype for tensor in started.values()} == {torch.bfloat16}
    assert not any(tensor.is_inference() for cut in cuts.values() for tensor in (cut.kept, cut.weight, cut.bias))


def test_activations_that_are_not_finite_are_one_sentence():
    moments = Moments()
    moments(torch.full((1, 4, 3), float("inf")), torch.zeros(1))
    with pytest.raises(WanLiteError, match="not finite"):
        moments.finish()


def test_a_teacher_has_no_hooks_after_a_cut_that_was_closed(tmp_path):
    teacher = counting_teacher(depth=2)
    steps = cut_ffn(teacher, probe_of(teacher, 8), (0, 1), 64, Shelf(tmp_path / "shelf"))
    for told in steps:
        if teacher.forwards:
            break
    steps.close()
    assert not any(module._forward_hooks for module in teacher.module.modules())


def test_a_disk_that_takes_no_weights_is_one_sentence(tmp_path):
    shelf = Shelf(tmp_path / "shelf")
    (tmp_path / "shelf").rmdir()
    with pytest.raises(WanLiteError, match="blocks.0.ffn.2.bias could not be put aside"):
        shelf.put({"blocks.0.ffn.2.bias": torch.zeros(4)})
