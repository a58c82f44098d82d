"""The count of live bytes, against what is known and against the allocator's own record; and training run dry, against training."""
import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from wanlite_model.distill.adapters import Adapters, fresh_factors
from wanlite_model.distill.dry import FUSED_RMS_NORM, dry_run
from wanlite_model.cond import Cond
from wanlite_model.distill.evaluate import student_velocity
from wanlite_model.distill.job import Recipe
from wanlite_model.distill.live import LiveBytes
from wanlite_model.distill.optim import WeightAverage, make_optimizer
from wanlite_model.transformer import WanLiteStudent

FIELDS = {"hidden_size": 256, "depth": 6, "ffn_dim": 512}
SHAPE = (16, 3, 16, 16)
N = 1000
UNIT = 4 * N                    # bytes of N numbers in fp32


@pytest.fixture
def counter():
    with LiveBytes() as counter:
        yield counter


def test_a_storage_counts_once_whatever_looks_into_it_and_until_nothing_does(counter):
    x = torch.empty(N)
    views = [x[10:], x.view(10, -1).t(), x.detach(), *x.split(100), x.expand(5, N)]
    x.add_(1)
    assert counter.now("cpu") == UNIT
    del x
    assert counter.now("cpu") == UNIT
    views.clear()
    assert counter.now("cpu") == 0 and counter.peak("cpu") == UNIT


def test_a_resized_tensor_counts_as_what_it_has_become(counter):
    x = torch.empty(N)
    x.resize_(3 * N)
    assert counter.now("cpu") == 3 * UNIT == counter.peak("cpu")
    x.set_()
    assert counter.now("cpu") == 0


def test_what_is_made_from_numbers_or_copied_whole_counts(counter):
    x = torch.tensor([1.0] * N)
    parameter = copy.deepcopy(nn.Parameter(x))
    assert counter.now("cpu") == 2 * UNIT
    parameter.data = x
    assert counter.now("cpu") == UNIT
    del x
    assert counter.now("cpu") == UNIT


def test_lists_and_several_answers_count_each(counter):
    x = torch.ones(2, N)
    sums = torch._foreach_add(list(x.unbind(0)), 1.0)
    assert counter.now("cpu") == 4 * UNIT
    torch._foreach_mul_(sums, 2.0)
    assert counter.now("cpu") == 4 * UNIT == counter.peak("cpu")
    del sums
    values, places = x.sort()
    assert counter.now("cpu") == 2 * UNIT + 2 * UNIT + 4 * UNIT             # places are int64
    del places
    assert counter.now("cpu") == 4 * UNIT and values.dtype == torch.float32


def test_what_was_there_before_counts_when_it_is_held():
    x = torch.ones(2, N)
    with LiveBytes() as counter:
        y = x.t()
        x.mul_(2)
        assert counter.now("cpu") == 0
        counter.hold([x, y, x[0]])
        assert counter.now("cpu") == 2 * UNIT
        z = x + 1
        counter.reset_peak()
        del x, y
        assert counter.now("cpu") == 2 * UNIT and counter.peak("cpu") == 4 * UNIT
        counter.reset_peak()
        assert counter.peak("cpu") == 2 * UNIT
    del z
    assert counter.now("cpu") == 0                                          # after the end too


def test_what_autograd_saves_lives_until_backward_and_gradients_count(counter):
    weight = nn.Parameter(torch.ones(N))
    loss = (weight * 2).exp().exp().sum()
    gc.collect()
    assert counter.now("cpu") == 3 * UNIT + 4           # exp saves its answer; 2 * weight is gone
    loss.backward()
    assert counter.now("cpu") == 2 * UNIT + 4           # weight and its gradient
    assert counter.peak("cpu") > 4 * UNIT


def block(x):
    for _ in range(8):
        x = x.sin().exp()
    return x


def test_checkpointing_lowers_the_peak_and_what_it_computes_again_counts():
    def peaks(*blocks):
        with LiveBytes() as counter:
            x = torch.zeros(N, requires_grad=True)
            for of in blocks:
                x = of(x)
            forward = counter.peak("cpu")
            x.sum().backward()
            return forward, counter.peak("cpu")

    def again(x):
        return checkpoint(block, x, use_reentrant=False)

    forward, backward = peaks(*[block] * 6)
    forward_again, backward_again = peaks(*[again] * 6)
    assert forward == 50 * UNIT and forward_again <= 10 * UNIT              # sin saves what the exp before it answered
    assert forward_again + 5 * UNIT < backward_again < backward / 2


def trained_twice(fields, recipe, again, dtype=torch.float32, autocast=contextlib.nullcontext, device="cpu", context=5):
    """Two optimizer steps as the trainer makes them: what the optimizer keeps is there in the second only."""
    student = WanLiteStudent.from_wan(WanLiteStudent(**fields).wan, device=device).to(dtype).train()
    if again:
        student.enable_gradient_checkpointing()
    trained = dict(student.named_parameters())
    if recipe.rank:
        student.requires_grad_(False)
        trained = Adapters(student, fresh_factors(student, recipe.rank, torch.Generator().manual_seed(0))).parameters
    average, optimizer = WeightAverage(trained, recipe.ema_decay), make_optimizer(trained, recipe)
    x, target, sigma, context = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE), torch.rand(2), torch.randn(2, context, 4096)
    for step in range(2):
        with autocast():
            velocity = student_velocity(student, x, sigma, Cond(context=context))
        loss = (velocity - target.to(velocity.device)).square().mean()
        loss.backward()
        norm = clip_grad_norm_(trained.values(), recipe.max_grad_norm)
        assert torch.isfinite(loss + norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step)
        with average.in_place():
            assert float(loss.detach()) == float(loss.detach())


def autocast_to_bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("recipe, again, half", [({}, False, False), ({}, True, False), ({}, True, True), ({"optimizer": "Muon"}, True, False),
                                                 ({"rank": 8}, False, False), ({"rank": 8}, True, False)], ids=str)
def test_a_training_run_dry_takes_as_many_bytes_as_it_takes(recipe, again, half):
    """half: under autocast, which is in C++ for real tensors and is done over for dry ones."""
    asked = {"fields": FIELDS, "recipe": Recipe(**recipe), "again": again, "autocast": autocast_to_bf16 if half else contextlib.nullcontext}
    with LiveBytes() as real:
        trained_twice(**asked)
    drawn = torch.get_rng_state()
    with dry_run("cpu") as dry:
        trained_twice(**asked)
    gc.collect()
    assert dry.peak("cpu") == pytest.approx(real.peak("cpu"), rel=1e-3)
    assert dry.now("cpu") == 0
    assert torch.equal(torch.get_rng_state(), drawn)


def allocated_at_most(function):
    """Bytes, by torch's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def test_the_count_is_that_of_the_allocator():
    def train():
        trained_twice({**FIELDS, "depth": 1}, Recipe(rank=8), again=True)

    train()             # what torch makes once is made
    expected = allocated_at_most(train)
    with LiveBytes() as counter:
        train()
    assert counter.peak("cpu") == pytest.approx(expected, rel=5e-3)         # kernels have some memory of their own


@pytest.fixture
def dry():
    with dry_run("cuda") as dry:
        yield dry


def test_dry_tensors_say_where_they_are_and_count_there(dry):
    x = torch.ones(N, device="cuda")
    assert x.device.type == "cuda" and x.is_cuda and not x.is_cpu and (dry.now("cuda"), dry.now("cpu")) == (UNIT, 0)
    y = x.cpu()
    assert y.device.type == "cpu" and not y.is_cuda and (dry.now("cuda"), dry.now("cpu")) == (UNIT, UNIT)
    z = (y * 2).to(x)
    assert z.is_cuda and x.to("cuda") is x and torch.zeros_like(y).is_cpu and torch.zeros_like(y, device="cuda").is_cuda
    pinned = torch.empty(N, pin_memory=True)
    assert pinned.copy_(x, non_blocking=True).is_cpu and (x * torch.tensor(2.0)).is_cuda
    del x, y, z, pinned
    assert dry.now("cuda") == dry.now("cpu") == 0
    module = nn.Linear(10, 20).to("cuda", torch.bfloat16)
    assert all(value.is_cuda for value in module.parameters()) and dry.now("cuda") == 2 * 220 and dry.now("cpu") == 0


def test_small_dtypes_count_by_their_bytes(dry):
    x = torch.ones(N, device="cuda").to(torch.float8_e4m3fn)
    y = torch.zeros(N, dtype=torch.uint8, device="cuda")
    assert dry.now("cuda") == 2 * N
    assert (x.to(torch.bfloat16) * 2).dtype == torch.bfloat16 and y.view(torch.float8_e4m3fn).float().dtype == torch.float32


def test_what_is_read_from_dry_tensors_lets_a_training_go_on(dry):
    x = torch.randn(4, 5, device="cuda")
    assert torch.isfinite(x.sum()) and float(x.mean()) == 1.0 and int(x.argmax()) == 0 and torch.arange(3).tolist() == [0, 0, 0]
    rows = x.ne(0).any(dim=1).nonzero()
    assert rows.shape == (4, 1) and int(rows.max()) == 3
    assert x[x > 0].shape == (20,) and x[:, torch.ones(5, dtype=torch.bool)].shape == (4, 5)


def test_real_tensors_keep_their_values_until_they_meet_a_dry_one():
    real, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with dry_run("cuda"):
        x = torch.randn(4)
        assert (real * 2).tolist() == [0, 2, 4, 6] and (real + x).is_meta and x[mask].shape == (2,)
        real[mask] = x[mask]
        assert real.to("cuda").is_cuda and real.tolist() == [0, 1, 2, 3]


def test_attention_on_a_gpu_has_no_logits_and_saves_what_its_kernels_save(dry):
    length, text = 20_000, 30
    q, k, v = (torch.randn(1, 2, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    one = q.numel() * 2
    out = F.scaled_dot_product_attention(q, k, v)
    assert dry.now("cuda") == 4 * one + 4 * 2 * length and out.is_contiguous()          # beside them one number for each query
    out.sum().backward()
    assert dry.peak("cuda") < 12 * one
    bias = torch.zeros(text, device="cuda", dtype=torch.bfloat16).expand(1, 2, length, text)
    q.grad, before = None, dry.now("cuda")
    again = F.scaled_dot_product_attention(q, k[:, :, :text], v[:, :, :text], attn_mask=bias)
    assert dry.now("cuda") - before == one + 4 * 2 * length - one and again.transpose(1, 2).is_contiguous()
    again.sum().backward()


def test_a_norm_on_a_gpu_is_one_kernel_where_torch_has_it(dry):
    x, weight = torch.ones(50, N // 50, device="cuda", requires_grad=True), torch.ones(N // 50, device="cuda", requires_grad=True)
    before = dry.now("cuda")
    y = F.rms_norm(x, weight.shape, weight, 1e-6)
    assert dry.now("cuda") - before == (UNIT + 4 * 50 if FUSED_RMS_NORM else 2 * UNIT + 4 * 50)
    y.sum().backward()
    assert x.grad.is_cuda and weight.grad.shape == weight.shape


def test_under_autocast_a_weight_has_one_half_precision_copy_until_it_ends(dry):
    layer, x = nn.Linear(N, N, device="cuda"), torch.ones(1, N, device="cuda")
    before = dry.now("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == layer(x).dtype == torch.bfloat16 and F.layer_norm(layer(x), (N,)).dtype == torch.float32
        assert dry.now("cuda") - before == 2 * (N * N + N)
        with torch.autocast("cuda", enabled=False):
            assert layer(x).dtype == torch.float32
    assert dry.now("cuda") == before


def test_saved_tensors_may_be_kept_on_the_cpu(dry):
    def elsewhere(tensor):
        return tensor.device, torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)

    def back(packed):
        device, kept = packed
        return kept.to(device)

    x = torch.ones(N, device="cuda", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(elsewhere, back):
        y = checkpoint(block, block(x), use_reentrant=False)
    assert (dry.now("cuda"), dry.now("cpu")) == (2 * UNIT, 17 * UNIT)       # each is kept for itself: 16 of one block, and the other's input
    y.sum().backward()
    assert (dry.now("cuda"), dry.now("cpu")) == (3 * UNIT, 0)


@pytest.mark.parametrize("recipe, dtype", [({"optimizer": "Muon"}, torch.float32), ({"rank": 8}, torch.bfloat16)], ids=str)
def test_a_training_for_a_gpu_runs_dry_without_one(recipe, dtype):
    with dry_run("cuda") as dry:
        trained_twice(FIELDS, Recipe(**recipe), again=True, dtype=dtype, device="cuda")
    gc.collect()
    assert dry.now("cuda") == dry.now("cpu") == 0
    assert dry.peak("cuda") > 20 * 2**20 and dry.peak("cpu") < 40 * 2**20


def test_weights_of_14b_take_no_memory_and_a_whole_clip_no_time():
    fields = {"hidden_size": 5120, "depth": 4, "ffn_dim": 13824}
    with dry_run("cuda") as dry:
        with torch.device("cuda"):
            student = WanLiteStudent(**fields).to(torch.bfloat16)
        held = dry.now("cuda")
        assert held == 2 * student.num_parameters()
        dry.reset_peak()
        with torch.no_grad():
            student_velocity(student, torch.randn(1, 16, 21, 60, 104), torch.ones(1), Cond(context=torch.randn(1, 50, 4096)))
        one = 21 * 30 * 52 * 5120
        assert 10 * one < dry.peak("cuda") - held < 40 * one


def test_streams_and_generators_of_a_gpu_that_is_not_there_are_none_of_a_dry_runs_business(dry):
    side = torch.cuda.Stream(torch.device("cuda"))
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.current_stream(torch.device("cuda")))
    drawn = torch.rand(3, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    assert drawn.is_cuda and torch.empty(3, dtype=torch.int32, device="cuda").random_(0, 9, generator=torch.Generator("cuda")).is_cuda


def test_after_a_dry_run_everything_is_as_it_was():
    def patched():
        hooks = torch.autograd.graph.saved_tensors_hooks
        return torch.clear_autocast_cache, hooks.__init__, torch.Generator, torch.cuda.Stream.__new__, torch.cuda.stream

    before = patched()
    with pytest.raises(ZeroDivisionError), dry_run("cuda"):
        1 / 0
    assert patched() == before
    x = torch.ones(3, requires_grad=True)
    (x * 2).sum().backward()
    assert x.device.type == "cpu" and x.grad.tolist() == [2, 2, 2]
