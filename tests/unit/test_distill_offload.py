"""What makes a training fit: block inputs kept elsewhere, a frozen base in float8, blocks that visit the device. Each for itself, and together."""
import itertools
import math

import pytest
import torch
from helpers_tiny import random_wan
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from wanlite_model import teacher as teachers
from wanlite_model import transformer
from wanlite_model.distill.adapters import Adapters, BaseTeacher, fresh_factors
from wanlite_model.distill.dry import dry_run
from wanlite_model.distill.frozen import FLOAT8, Float8Linear, dequantised, hold_in_float8, places, quantised
from wanlite_model.pinned import host_memory, pieces
from wanlite_model.swap import Swap, lay_out
from wanlite_model.cond import Cond
from wanlite_model.teacher import FileTeacher, ModuleTeacher, at_work
from wanlite_model.transformer import WanLiteStudent

CPU = torch.device("cpu")
DEPTH, TOKENS, DIM = 5, 2 * 3 * 6, 128
MATRICES = 10                   # of a block


def inputs():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 16, 3, 4, 6, generator=draw), torch.tensor([900.5, 120.25]), torch.randn(2, 5, 4096, generator=draw)


def frozen_wan():
    """A frozen WAN with gradient checkpointing, as a training of adapters begins with."""
    module = random_wan(depth=DEPTH).requires_grad_(False)
    module.enable_gradient_checkpointing()
    return module


def laid_out(float8=False, swapped=0, dtype=torch.float32, device=CPU):
    """The same WAN, as a training makes it that has to save memory."""
    source = random_wan(depth=DEPTH)
    module = WanLiteStudent.from_wan(source.wan, "meta", dtype).requires_grad_(False).eval()
    module.enable_gradient_checkpointing()
    if float8:
        hold_in_float8(module, device)
    lay_out(module, device, swapped)
    if device == CPU:
        filled(module, source.state_dict())
    return module


def filled(module, state):
    into = places(module)
    assert list(into) == list(state)
    for name, value in state.items():
        into[name].copy_(value)


def adapters_of(module):
    """Adapters that count: fresh ones are zero."""
    adapters = Adapters(module, fresh_factors(module, 4, torch.Generator().manual_seed(1)))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in adapters.parameters.values():
            value.add_(torch.randn(value.shape, generator=draw) * 0.05)
    return adapters


def learned(module, adapters):
    """(velocity, gradients of the adapters)"""
    velocity = module(*inputs())
    velocity.square().mean().backward()
    return velocity.detach(), {name: value.grad for name, value in adapters.parameters.items()}


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert all(torch.equal(value, expected[1][name]) and value.any() for name, value in found[1].items())


@pytest.fixture(scope="module")
def plain():
    module = frozen_wan()
    return learned(module, adapters_of(module))


def alive(references):
    return sum(not reference.expired() for reference in references)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_inputs_of_blocks_are_kept_where_they_are_to_be_and_nowhere_else(elsewhere, plain, monkeypatch):
    moved, seen = [], []

    def watched(pack, unpack):
        return saved_tensors_hooks(lambda tensor: moved.append(tuple(tensor.shape)) or pack(tensor), unpack)

    monkeypatch.setattr(transformer, "saved_tensors_hooks", watched)
    module = frozen_wan()
    adapters = adapters_of(module)
    module.checkpoints_on_cpu = elsewhere
    for block in module.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(StorageWeakRef(given[0].untyped_storage())))
    velocity = module(*inputs())
    assert len(seen) == DEPTH and alive(seen) == (0 if elsewhere else DEPTH)
    assert [shape for shape in moved if 0 not in shape] == ([(2, TOKENS // 2, DIM)] * DEPTH if elsewhere else [])
    velocity.square().mean().backward()
    assert len(seen) == 2 * DEPTH                       # each was computed twice
    assert_same((velocity.detach(), {name: value.grad for name, value in adapters.parameters.items()}), plain)


def test_a_student_that_is_trained_whole_gets_the_same_gradients_from_inputs_kept_elsewhere():
    def gradients(elsewhere):
        module = random_wan(depth=2)
        module.enable_gradient_checkpointing()
        module.checkpoints_on_cpu = elsewhere
        module(*inputs()).square().mean().backward()
        return [parameter.grad for parameter in module.parameters()]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_a_matrix_in_float8_is_near_in_every_row_and_finite():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 256, generator=draw) * torch.logspace(-9, 9, 64).unsqueeze(1)
    matrix[0], matrix[1] = 0.0, torch.logspace(-6, 3, 256)
    weight, scale = quantised(matrix)
    assert weight.dtype == FLOAT8 and scale.shape == (64, 1) and scale.dtype == torch.float32
    whole = dequantised(weight, scale, torch.float32)
    assert torch.isfinite(whole).all() and not whole[0].any()
    smallest = matrix.abs().amax(1, keepdim=True) / 448 / 1024          # half of what float8's smallest number is in that row
    assert ((whole - matrix).abs() <= 1.001 * (matrix.abs() / 16).maximum(smallest)).all()
    assert ((whole - matrix)[1:].norm(dim=1) < 0.035 * matrix[1:].norm(dim=1)).all()
    half = dequantised(weight, scale, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and ((half.float() - whole).abs() <= whole.abs() / 256).all()


def test_a_wan_in_float8_is_a_quarter_of_fp32_answers_alike_and_keeps_its_names():
    whole, module = frozen_wan(), laid_out(float8=True)
    names, before = list(whole.state_dict()), {name: value.shape for name, value in whole.named_parameters()}
    with torch.no_grad():
        expected, found = whole(*inputs()), module(*inputs())
    assert list(module.state_dict()) == names and {name: value.shape for name, value in module.named_parameters()} == before
    held = [layer for layer in module.modules() if isinstance(layer, Float8Linear)]
    assert len(held) == DEPTH * MATRICES and all(layer.weight.element_size() == 1 for layer in held)
    others = [value.dtype for name, value in module.state_dict().items() if value.ndim != 2 or not name.startswith("blocks.")]
    assert set(others) == {torch.float32}
    assert found.dtype == torch.float32 and (found - expected).norm() < 0.05 * expected.norm()


def float8_layers(module):
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, Float8Linear)}


def test_gradients_through_float8_are_those_of_the_matrices_it_stands_for_and_none_of_these_is_kept():
    module, same = laid_out(float8=True), frozen_wan()
    layers = float8_layers(module)
    with torch.no_grad():
        for path, layer in layers.items():
            same.get_submodule(path).weight.copy_(dequantised(layer.weight, layer.scale, torch.float32))
    expected = learned(same, adapters_of(same))
    module.disable_gradient_checkpointing()             # then all that the blocks save is kept until backward
    kept, adapters = [], adapters_of(module)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = learned(module, adapters)
    torch.testing.assert_close(found, expected)
    own = {value.data_ptr() for value in module.parameters()}
    shapes = {tuple(layer.weight.shape) for layer in layers.values()}
    matrices = [tensor for tensor in kept if tuple(tensor.shape) in shapes]
    assert len(matrices) >= 8 * DEPTH and all(tensor.data_ptr() in own for tensor in matrices)


def test_other_weights_are_taken_and_the_first_come_back_bit_for_bit():
    module, first, other = laid_out(float8=True), random_wan(depth=DEPTH).state_dict(), random_wan(seed=9, depth=DEPTH)
    before = {path: (layer.weight.clone(), layer.scale.clone()) for path, layer in float8_layers(module).items()}
    with torch.no_grad():
        expected = module(*inputs())
        for source, check in ((other.state_dict(), other), (first, None)):
            filled(module, source)
            found, wanted = module(*inputs()), expected if check is None else check(*inputs())
            assert torch.equal(found, wanted) if check is None else (found - wanted).norm() < 0.05 * wanted.norm()
    for path, layer in float8_layers(module).items():
        assert all(map(torch.equal, (layer.weight.float(), layer.scale), (before[path][0].float(), before[path][1])))


class Copies:
    """All copies of swapped matrices that are ever made, and which blocks ran on them."""

    def __init__(self, patch):
        self.made, self.most, self.ran = [], 0, []
        sent = Swap._sent

        def watched(swap, place):
            weights = sent(swap, place)
            self.made += [StorageWeakRef(weight.untyped_storage()) for weight in weights.values()]
            self.most = max(self.most, self.alive)
            return weights
        patch.setattr(Swap, "_sent", watched)

    def watch(self, module):
        own = {value.data_ptr() for value in module.parameters()}
        for i, block in enumerate(module.blocks):
            for layer in (block.self_attn.q, block.ffn[2]):
                layer.register_forward_pre_hook(lambda layer, _, i=i: None if layer.weight.data_ptr() in own else self.ran.append(i))

    @property
    def alive(self):
        return alive(self.made)


@pytest.fixture
def copies(monkeypatch):
    return Copies(monkeypatch)


@pytest.mark.parametrize(("count", "which"), [(0, []), (1, [0]), (2, [0, 2]), (DEPTH, list(range(DEPTH)))])
def test_swapped_blocks_learn_the_same_and_copies_live_no_longer_than_their_block_runs(count, which, plain, copies):
    module = laid_out(swapped=count)
    copies.watch(module)
    adapters, twice = adapters_of(module), sorted(2 * which)
    with torch.no_grad():
        assert torch.equal(module(*inputs()), plain[0])
    assert copies.ran == twice and copies.alive == 0 and len(copies.made) == MATRICES * count
    velocity = module(*inputs())
    assert copies.ran == 2 * twice and copies.alive == 0
    velocity.square().mean().backward()
    assert_same((velocity.detach(), {name: value.grad for name, value in adapters.parameters.items()}), plain)
    assert copies.ran == 2 * twice + twice[::-1] and copies.alive == 0 and len(copies.made) == 3 * MATRICES * count
    assert copies.most == MATRICES * min(2, count)      # one block's, and the next one's on their way


def test_a_block_that_is_passed_over_is_sent_for_in_vain_and_forgotten(copies):
    module = laid_out(swapped=DEPTH)
    with torch.no_grad():
        assert torch.equal(module(*inputs(), skip_blocks=[2]), frozen_wan()(*inputs(), skip_blocks=[2]))
    assert copies.alive == 0 and len(copies.made) == DEPTH * MATRICES and copies.most == 2 * MATRICES


@pytest.mark.parametrize("float8", [False, True], ids=["as it is", "float8"])
def test_only_matrices_of_swapped_blocks_stay_at_home(float8):
    module = laid_out(float8, 2, device=torch.device("meta"))           # stands for a GPU
    home = {name for name, value in module.state_dict().items() if value.device == CPU}
    matrices = {f"{path}.weight" for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert home == {name for name in matrices if name.startswith(("blocks.0.", "blocks.2."))} and len(home) == 2 * MATRICES
    assert {value.device.type for value in module.buffers()} == ({"meta"} if float8 else set())


def test_a_swapped_block_without_checkpointing_is_right_too(copies):
    module, same = laid_out(swapped=2), frozen_wan()
    module.disable_gradient_checkpointing()
    same.disable_gradient_checkpointing()
    assert_same(learned(module, adapters_of(module)), learned(same, adapters_of(same)))
    assert copies.made and copies.alive == 0


@pytest.mark.parametrize("float8", [False, True], ids=["as it is", "float8"])
def test_a_state_dict_reaches_the_weights_of_swapped_blocks(float8):
    module, other, source = laid_out(float8, DEPTH), laid_out(float8), random_wan(seed=9, depth=DEPTH).state_dict()
    with torch.no_grad():
        module(*inputs())
        filled(module, source)
        filled(other, source)
        assert torch.equal(module(*inputs()), other(*inputs()))


def test_a_block_that_fails_leaves_its_weights_where_they_were():
    module = laid_out(swapped=2)
    homes = {name: value.data_ptr() for name, value in module.named_parameters()}

    def fail(*_):
        raise RuntimeError("stopped")

    handle = module.blocks[0].ffn[2].register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="stopped"):
        module(*inputs())
    handle.remove()
    assert {name: value.data_ptr() for name, value in module.named_parameters()} == homes
    with torch.no_grad():
        assert torch.equal(module(*inputs()), frozen_wan()(*inputs()))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16 autocast"])
def test_all_of_it_together_learns_what_float8_alone_learns(half, copies):
    def run(module):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            return module(*inputs())

    dtype, inside = torch.bfloat16 if half else torch.float32, []
    alone, module = (laid_out(float8=True, swapped=swapped, dtype=dtype) for swapped in (0, 3))
    module.checkpoints_on_cpu = True
    copies.watch(module)
    ours, its = adapters_of(module), adapters_of(alone)
    for block in module.blocks:
        block.register_forward_pre_hook(lambda _, given: inside.append(StorageWeakRef(given[0].untyped_storage())))
    found, expected = run(module), run(alone)
    assert copies.alive == alive(inside) == 0 and len(inside) == DEPTH and copies.ran == [0, 0, 1, 1, 3, 3]
    for velocity in (found, expected):
        velocity.square().mean().backward()
    assert copies.alive == 0 and copies.most == 2 * MATRICES
    assert_same(*((velocity.detach(), {name: value.grad for name, value in adapters.parameters.items()})
                  for velocity, adapters in ((found, ours), (expected, its))))


def test_a_base_in_float8_that_is_swapped_is_asked_as_a_teacher(copies):
    module, alone, (x, t, context) = laid_out(swapped=3, float8=True), laid_out(float8=True), inputs()
    base = BaseTeacher(module, [adapters_of(module)], ModuleTeacher(random_wan(depth=1), shift=3.0))
    with torch.no_grad():
        assert torch.equal(base.velocity(x, t / 1000, Cond(context=context)), alone(x, 1000 * (t / 1000), context))
    assert copies.made and copies.alive == 0


@pytest.mark.parametrize(("left", "visiting"), [(math.inf, 0), (DEPTH + 0.1, 0), (DEPTH - 0.1, 3), (3, 4), (0, DEPTH)])
def test_blocks_of_a_teacher_visit_a_device_that_is_too_small_for_it(left, visiting, tmp_path, monkeypatch, copies):
    random_wan(depth=DEPTH).save_pretrained(tmp_path / "wan", dtype=torch.float32)
    shell, x = random_wan(depth=DEPTH), inputs()[0]
    block = sum(4 * value.numel() for value in shell.blocks[0].parameters())
    beside = sum(4 * value.numel() for value in shell.parameters()) - DEPTH * block
    monkeypatch.setattr(teachers, "free_memory", lambda _: beside + at_work(shell.wan, x.shape) + left * block)
    teacher = FileTeacher(tmp_path / "wan", shift=3.0, device=CPU)
    with torch.inference_mode():
        found = teacher.velocity(x, torch.tensor([0.9, 0.1]), Cond(context=inputs()[2]))
    assert len(copies.made) == visiting * MATRICES and copies.alive == 0
    assert torch.equal(found, ModuleTeacher(shell, shift=3.0).velocity(x, torch.tensor([0.9, 0.1]), Cond(context=inputs()[2])))
    opened = teacher._opened
    teacher.release(1000)
    assert teacher._opened is opened            # that much is there as it is
    teacher.release()
    assert teacher._opened is None and teacher.velocity(x, torch.tensor([0.9, 0.1]), Cond(context=inputs()[2])).equal(found)


def test_a_teacher_that_is_asked_for_more_at_once_makes_room_where_there_is_none(tmp_path, monkeypatch):
    random_wan(depth=1).save_pretrained(tmp_path / "wan", dtype=torch.float32)
    teacher, (x, t, context) = FileTeacher(tmp_path / "wan", shift=3.0, device=CPU), inputs()
    free, opened = [math.inf], []
    monkeypatch.setattr(teachers, "free_memory", lambda _: free[0])
    for count, free[0] in ((1, math.inf), (2, math.inf), (2, 0), (3, 0), (1, 0)):
        teacher.velocity(x[:1].repeat(count, 1, 1, 1, 1), t[:1].repeat(count) / 1000, Cond(context=context[:1].repeat(count, 1, 1)))
        opened.append(teacher._opened)
    assert opened[0] is opened[1] is opened[2] and opened[3] is opened[4] is not opened[0]


@pytest.mark.parametrize("sizes", [[1], [512, 513, 1], [7 * 2**20] * 400, [26 * 2**20] * 8 + [70 * 2**20] * 2])
def test_pinned_memory_is_taken_in_pieces_that_are_full(sizes):
    taken = [*pieces(sizes)]
    assert sum(count for count, _ in taken) == len(sizes) and all(size & (size - 1) == 0 for _, size in taken)
    starts = itertools.accumulate((count for count, _ in taken), initial=0)
    assert all(sum(sizes[start:start + count]) <= size for start, (count, size) in zip(starts, taken))
    assert sum(size for _, size in taken) <= 2 * sum(sizes) and (len(sizes) < 100 or sum(size for _, size in taken) < 1.05 * sum(sizes))


def test_pinned_tensors_lie_apart_and_are_counted_as_torch_takes_them():
    with dry_run("cuda") as count:
        made = host_memory([torch.empty(3, 5, dtype=FLOAT8, device="cuda"), torch.empty(100, device="cuda")], torch.device("cuda"))
        assert [(value.shape, value.dtype, value.storage_offset() * value.element_size()) for value in made] == [((3, 5), FLOAT8, 0), ((100,), torch.float32, 512)]
        assert count.now("cpu") == 1024 and all(value.is_cpu for value in made)
    assert [value.shape for value in host_memory(made, CPU)] == [(3, 5), (100,)]
