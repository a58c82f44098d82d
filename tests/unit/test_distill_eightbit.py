"""AdamW with moments of 8 bits: against torch's, at the edges, from where it stopped, and weights in bf16."""
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wanlite_model.distill import eightbit
from wanlite_model.distill.eightbit import BETAS, BLOCK, FLOOR, REACH, AdamW8, packed, stochastic_round_, unpacked

SIZE = (64, 128)                # of a parameter whose moments are packed


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread_gradients(steps, shape=SIZE, octaves=8):
    """Gradients whose sizes differ by 2^octaves from value to value, each with its own mean."""
    sizes = 2 ** (octaves * (torch.rand(shape, generator=torch.Generator().manual_seed(99)) - 1))
    return [sizes * (0.3 + drawn(*shape, seed=step)) for step in range(steps)]


def moved(parameter, optimizer, gradients):
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return optimizer.state[parameter]


def torch_adamw(parameters, lr, weight_decay=0.0):
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=weight_decay)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 32)).to(dtype)


def final_loss(optimizer_of, dtype=torch.float32, steps=300):
    """Mean loss of the last 50 steps of a regression that cannot be learned whole; the matrices' moments are packed."""
    student = network(dtype)
    parameters = dict(student.named_parameters())
    optimizer, mixing, losses = optimizer_of(parameters.values()), 0.2 * drawn(32, 32, seed=1), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - 0.9 * step / steps)
        x = drawn(64, 32, seed=1000 + step)
        answer = torch.func.functional_call(student, {name: value.float() for name, value in parameters.items()}, x)
        loss = (answer - torch.sin(x @ mixing)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return sum(losses[-50:]) / 50


def test_with_moments_in_fp32_it_is_torchs_adamw():
    ours, theirs = nn.Parameter(drawn(10, 10)), nn.Parameter(drawn(10, 10))
    mine, its = AdamW8([ours], lr=0.0, weight_decay=0.1, seed=0), torch_adamw([theirs], 0.0, weight_decay=0.1)
    for step, gradient in enumerate(spread_gradients(50, (10, 10))):
        mine.param_groups[0]["lr"] = its.param_groups[0]["lr"] = 1e-2 / (1 + step)
        moved(ours, mine, [gradient])
        moved(theirs, its, [gradient])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(mine.state[ours]), dict(its.state[theirs]), rtol=1e-5, atol=0)


def test_it_learns_as_well_as_adamw_and_bf16_weights_do_too():
    exact = final_loss(lambda trained: torch_adamw(trained, 2e-3))
    assert exact < 0.2                                                              # of 0.4: it does learn
    for dtype in (torch.float32, torch.bfloat16):
        assert final_loss(lambda trained: AdamW8(trained, lr=2e-3, weight_decay=0.0, seed=0), dtype) == pytest.approx(exact, rel=0.01)


def test_two_bytes_hold_the_moments_of_a_value():
    parameter = nn.Parameter(drawn(*SIZE))
    state = moved(parameter, AdamW8([parameter], lr=1e-3, weight_decay=0.0, seed=0), spread_gradients(1))
    assert sum(value.nbytes for value in state.values()) == 4 + parameter.numel() * (2 + 4 / BLOCK)
    assert {key: value.dtype for key, value in state.items()} == {
        "first": torch.int8, "root": torch.uint8, "scale": torch.float32, "step": torch.float32}


def test_the_moments_follow_torchs_without_bias():
    ours, theirs, gradients = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE)), spread_gradients(300)
    mine, its = AdamW8([ours], lr=1e-3, weight_decay=0.0, seed=0), torch_adamw([theirs], 1e-3)
    kept, exact = unpacked(moved(ours, mine, gradients)), moved(theirs, its, gradients)
    ratio = (kept["exp_avg_sq"] / exact["exp_avg_sq"]).sqrt()
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02) and float(ratio.std()) < 0.12
    error = (kept["exp_avg"] - exact["exp_avg"]) / exact["exp_avg_sq"].sqrt()
    assert float(error.mean()) == pytest.approx(0, abs=2e-3) and float(error.std()) < 0.05
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 0.06


def test_the_second_moment_falls_when_gradients_do():
    """Beside a value of the same block that keeps the scale where it is: to the nearest code, nothing would move."""
    gradients = torch.ones(SIZE)
    later = torch.where(torch.arange(SIZE[1]) % 2 == 0, 1.0, 0.01).expand(SIZE)
    parameter = nn.Parameter(torch.zeros(SIZE))
    optimizer = AdamW8([parameter], lr=0.0, weight_decay=0.0, seed=0)
    roots = unpacked(moved(parameter, optimizer, [gradients] * 100 + [later] * 400))["exp_avg_sq"].sqrt()
    expected = math.sqrt((1 - BETAS[1] ** 100) * BETAS[1] ** 400)
    assert float(roots[:, 1::2].mean()) == pytest.approx(expected, rel=0.1)


def test_rounded_to_the_nearest_code_the_error_is_half_a_step():
    v = 2 ** (24 * (torch.rand(SIZE, generator=torch.Generator().manual_seed(1)) - 1))
    m = v.sqrt() * (2 * torch.rand(SIZE, generator=torch.Generator().manual_seed(2)) - 1) * REACH
    kept = unpacked(packed({"exp_avg": m, "exp_avg_sq": v, "step": torch.tensor(3.0)}))
    ratio = (kept["exp_avg_sq"] / v).sqrt()
    assert 0.98 < float(ratio.min()) and float(ratio.max()) < 1.02
    assert ((kept["exp_avg"] - m * ratio).abs() <= 1.01 * REACH / 254 * v.sqrt() * ratio).all()
    tiny = torch.full(SIZE, 1e-20)
    tiny[:, 0] = 1.0
    floor = unpacked(packed({"exp_avg": tiny * 0, "exp_avg_sq": tiny, "step": torch.tensor(3.0)}))["exp_avg_sq"].sqrt()
    assert float(floor[:, 1:].min()) > 0.9 * FLOOR                                  # too large, never too small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_is_too_large_too_small_or_too_seldom(dtype):
    lr, parameter = 1e-3, nn.Parameter(torch.zeros(SIZE, dtype=dtype))
    optimizer, generator = AdamW8([parameter], lr=lr, weight_decay=0.0, seed=0), torch.Generator().manual_seed(0)
    for exponent in (0, -45, -30, -8, 0, 30, 37, 0, -30, 0):                        # 1e-45: only fp32 can hold it
        gradient = 10.0 ** exponent * drawn(*SIZE, seed=exponent + 50)
        gradient *= 10.0 ** -torch.randint(0, 12, SIZE, generator=generator)        # from value to value
        gradient *= torch.rand(SIZE, generator=generator) < 0.5
        before = parameter.detach().clone().float()
        moved(parameter, optimizer, [gradient])
        assert (parameter.detach().float() - before).abs().max() <= 1.1 * REACH * lr * 5
        assert all(value.isfinite().all() for value in optimizer.state[parameter].values())
    still = nn.Parameter(drawn(*SIZE).to(dtype))
    before = still.detach().clone()
    moved(still, AdamW8([still], lr=lr, weight_decay=0.0, seed=0), [torch.zeros(SIZE)] * 3)
    assert torch.equal(still, before)


def test_the_first_moment_never_leaves_its_reach():
    """Gradients that grow as fast as makes it the largest beside the second; and one whose square was too small for fp32."""
    parameter, growth, sizes = nn.Parameter(torch.zeros(SIZE)), BETAS[1] / BETAS[0], 0.1 + drawn(*SIZE).abs()
    state = moved(parameter, AdamW8([parameter], lr=1e-3, weight_decay=0.0, seed=0), [sizes * growth ** step for step in range(80)])
    assert 126 <= int(state["first"].min()) and float(state["first"].float().mean()) > 126.9
    signs = drawn(*SIZE).sign()
    lost = packed({"exp_avg": 1e-25 * signs, "exp_avg_sq": torch.zeros(SIZE), "step": torch.tensor(3.0)})
    assert torch.equal(lost["first"].float(), 127 * signs) and float(unpacked(lost)["exp_avg"].abs().max()) < 1e-30


def trained_pair(dtype):
    """A parameter that is packed and a small one, and their optimizer."""
    pair = [nn.Parameter(drawn(*SIZE).to(dtype)), nn.Parameter(drawn(7).to(dtype))]
    return pair, AdamW8(pair, lr=1e-3, weight_decay=0.01, seed=5)


def give_gradients(pair, step):
    for parameter in pair:
        parameter.grad = drawn(*parameter.shape, seed=step).to(parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_that_goes_on_is_the_same_to_the_bit(dtype, tmp_path):
    (through, whole), (stopped, first) = trained_pair(dtype), trained_pair(dtype)
    for step in range(10):
        give_gradients(through, step)
        whole.step()
    for step in range(5):
        give_gradients(stopped, step)
        first.step()
    save_file({f"{i}.{key}": value for i, parameter in enumerate(stopped) for key, value in first.state[parameter].items()}, tmp_path / "state")
    stored, (resumed, second) = load_file(tmp_path / "state"), trained_pair(dtype)
    for i, parameter in enumerate(resumed):
        parameter.data.copy_(stopped[i].data)
        second.state[parameter] = {key.partition(".")[2]: value for key, value in stored.items() if key.startswith(f"{i}.")}
    for step in range(5, 10):
        give_gradients(resumed, step)
        second.step()
    for ours, its in zip(resumed, through):
        assert torch.equal(ours, its) and same(second.state[ours], whole.state[its])


def test_the_seed_the_step_and_the_place_decide_how_is_rounded():
    def change(seed, steps, place):
        parameters = [nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16)) for _ in range(2)]
        return moved(parameters[place], AdamW8(parameters, lr=1e-5, weight_decay=0.0, seed=seed), spread_gradients(steps))["root"]

    assert torch.equal(change(0, 1, 0), change(0, 1, 0))
    assert not any(torch.equal(change(0, 2, 0), other) for other in (change(1, 2, 0), change(0, 3, 0), change(0, 2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_bound_the_memory_and_change_nothing(dtype, monkeypatch):
    class Largest(TorchDispatchMode):
        """The most bytes of one tensor that was made."""
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
            return made

    (once, at_once), (pieces, by_pieces) = trained_pair(dtype), trained_pair(dtype)
    for step in range(4):
        give_gradients(once, step)
        at_once.step()
    monkeypatch.setattr(eightbit, "CHUNK", 3 * BLOCK)                               # the last is shorter
    for step in range(4):
        give_gradients(pieces, step)
        state = [value for parameter in pieces for value in by_pieces.state[parameter].values()]
        known = {value.untyped_storage().data_ptr() for value in [*pieces, *(parameter.grad for parameter in pieces), *state]}
        with Largest() as largest:
            by_pieces.step()
        assert step == 0 or largest.bytes <= 3 * BLOCK * 4                          # the first makes the state
    assert all(torch.equal(a, b) and same(at_once.state[a], by_pieces.state[b]) for a, b in zip(once, pieces))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_parameter_at_a_time_from_hooks_is_the_same(dtype):
    (together, all_at_once), (single, one_by_one) = trained_pair(dtype), trained_pair(dtype)

    def release(parameter):
        one_by_one.step_parameter(parameter)
        parameter.grad = None

    for parameter in single:
        parameter.register_post_accumulate_grad_hook(release)
    for step in range(4):
        for pair in (together, single):
            sum((parameter * drawn(*parameter.shape, seed=step).to(dtype)).sum() for parameter in pair).backward()
        all_at_once.step()
        all_at_once.zero_grad()
        assert all(parameter.grad is None for parameter in single)
    assert all(torch.equal(a, b) and same(all_at_once.state[a], one_by_one.state[b]) for a, b in zip(together, single))


def test_moments_of_either_kind_are_taken_over():
    parameters = [nn.Parameter(drawn(*SIZE)), nn.Parameter(drawn(7))]
    theirs = torch_adamw(parameters, 1e-3)
    for parameter in parameters:
        moved(parameter, theirs, spread_gradients(5, tuple(parameter.shape)))
        exact = theirs.state[parameter]
        state = packed(exact)
        back = unpacked(state)
        assert same(packed(back), state) and back.keys() == exact.keys() and float(back["step"]) == 5
        torch.testing.assert_close(back["exp_avg_sq"].sqrt(), exact["exp_avg_sq"].sqrt(), rtol=0.02, atol=0)
        assert all(back[key].shape == exact[key].shape and back[key].dtype == exact[key].dtype for key in exact)
    assert same(back, dict(exact))                                                  # of the small one, to the bit
    mine = AdamW8(parameters, lr=1e-3, weight_decay=0.0, seed=0)
    state = moved(parameters[0], mine, spread_gradients(5))
    assert same(packed(unpacked(state)), dict(state))


def test_stochastic_rounding_is_right_on_average_and_keeps_what_bf16_holds():
    generator = torch.Generator().manual_seed(0)
    values = drawn(200) * 10.0 ** torch.randint(-20, 20, (200,), generator=generator)
    rows = torch.empty(4000, 200, dtype=torch.bfloat16)
    stochastic_round_(rows, values.expand(4000, 200).contiguous(), generator)
    ulp = 2.0 ** (values.abs().log2().floor() - 7)
    assert ((rows.float() - values).abs() < ulp).all()
    assert ((rows.double().mean(0) - values).abs() < 5 * ulp / math.sqrt(4000 * 4)).all()        # 5 standard errors of the widest case
    held = torch.cat([values.bfloat16(), torch.tensor([0.0, 3.3895e38, -3.3895e38, 1e-40], dtype=torch.bfloat16)])
    assert all(torch.equal(rounded(held.float(), generator), held) for _ in range(20))


def rounded(values, generator):
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    stochastic_round_(target, values, generator)
    return target


def test_stochastic_rounding_keeps_finite_what_is_and_nothing_else():
    generator, largest = torch.Generator().manual_seed(0), torch.finfo(torch.float32).max
    assert rounded(torch.tensor([largest, -largest, 3.39e38] * 100), generator).isfinite().all()
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)             # NaN as a GPU writes it
    assert rounded(torch.cat([all_ones, torch.tensor([math.inf, -math.inf])]), generator).isnan().all()


def test_bf16_weights_move_by_less_than_they_can_tell_apart():
    def travel(dtype, optimizer_of):
        parameter = nn.Parameter(torch.full(SIZE, 0.02, dtype=dtype))
        start = parameter.detach().clone().float()
        moved(parameter, optimizer_of([parameter]), [0.3 + drawn(*SIZE, seed=step) for step in range(60)])
        return float((parameter.detach().float() - start).mean())

    exact = travel(torch.float32, lambda trained: torch_adamw(trained, 1e-5))
    assert travel(torch.bfloat16, lambda trained: AdamW8(trained, lr=1e-5, weight_decay=0.0, seed=0)) == pytest.approx(exact, rel=0.05)
    assert abs(travel(torch.bfloat16, lambda trained: torch_adamw(trained, 1e-5))) < 0.1 * abs(exact)
