"""Block-wise distillation: each block that stands before a gap learns to hand on what the removed ones would have, by itself.

One block's weights, gradients and activations are on the device at a time, which is how a model gets slim that could not be trained
there as a whole. A block is fed what the student before it hands on, not what the teacher would: it makes up for the blocks before it as well.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from .. import flow
from ..teacher import Teacher
from ..transformer import Block, WanLiteStudent, rope_table
from .importance import Probe, answers, tokens
from .plan import CompressionPlan, Progress

KEPT = torch.float16            # of activations between blocks: rounding 2**-11
MEMORY = 2 << 30                # bytes of the teacher's activations held at a time
OUTLIER = 6.0                   # standard deviations; WAN's few massive activations would otherwise be the whole loss
TOKENS_A_STEP = 3072
LEARNING_RATE = 0.25            # of AdamW at width 1; a layer twice as wide moves twice as far by the same rate


Read = Callable[[str], Tensor]          # a tensor of the start by its name


def heal_blocks(teacher: Teacher, read: Read, plan: CompressionPlan, probe: Probe, steps: int, keep: Callable[[dict[str, Tensor]], None]
                ) -> Generator[Progress, None, None]:
    """Trains, in their order, the start's blocks from the first gap on, each for `steps` steps on the probe's states.

    read: the start's tensors. keep: takes a block's tensors once it is trained, by name and in their dtypes; then they are forgotten.
    Yields after each forward of the teacher and each step.
    """
    config, stage = plan.student_config(teacher.config), "Healing block by block"
    shell = _shell(read, plan, teacher)
    ends = [*(block - 1 for block in plan.keep[1:]), plan.teacher_layers - 1]       # the last teacher block that each of ours stands for
    hidden = _tokens_of(shell, probe)                                                # [S, N, D]: what the next block is fed
    each = hidden.numel() * KEPT.itemsize
    together = max(1, MEMORY // each)
    total = config.num_layers * steps
    first_gap = next((j for j, (block, end) in enumerate(zip(plan.keep, ends)) if block != end), config.num_layers)
    for start in range(0, config.num_layers, together):
        group = range(start, min(start + together, config.num_layers))
        targets = yield from _handed_on(teacher, probe, [ends[j] for j in group], stage, start * steps, total)
        for j in group:
            block = _fill(shell.blocks[0], read, j)
            if j >= first_gap:
                yield from _train(shell, block, probe, hidden, targets[ends[j]], steps, stage, j * steps, total)
                with torch.inference_mode(False), torch.no_grad():
                    keep({f"blocks.{j}.{name}": value.cpu().to(read(f"blocks.{j}.{name}").dtype, copy=True)
                          for name, value in block.state_dict().items()})
            hidden = _advance(shell, block, probe, hidden)
            del targets[ends[j]]
            yield Progress(stage=stage, done=(j + 1) * steps, total=total)


def _shell(read: Read, plan: CompressionPlan, teacher: Teacher) -> WanLiteStudent:
    """A student of one block, whose weights change places; all else is the student's own."""
    with torch.inference_mode(False):
        shell = WanLiteStudent.from_wan(teacher.config.resized(num_layers=1, ffn_dim=plan.ffn_dim), device="meta")
        state = {name: read(name).to(teacher.device, torch.float32, copy=True) for name in shell.state_dict()}
        shell.load_state_dict(state, assign=True)
    return shell.requires_grad_(False)


def _fill(block: Block, read: Read, j: int) -> Block:
    with torch.inference_mode(False), torch.no_grad():
        for name, value in block.state_dict().items():
            value.copy_(read(f"blocks.{j}.{name}"))
    return block


def _tokens_of(shell: WanLiteStudent, probe: Probe) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        device = shell.patch_embedding.weight.device
        return torch.cat([shell._tokens(x.to(device))[0].to("cpu", KEPT) for x in probe.x.split(probe.batch)])


def _handed_on(teacher: Teacher, probe: Probe, blocks: Sequence[int], stage: str, done: int, total: int
               ) -> Generator[Progress, None, dict[int, Tensor]]:
    """{teacher block: what it hands on at each state [S, N, D]}."""
    parts: dict[int, list[Tensor]] = {block: [] for block in blocks}
    taps = {f"blocks.{block}": lambda _, answered, block=block: parts[block].append(answered.detach().to("cpu", KEPT)) for block in blocks}
    for _ in answers(lambda x, sigma, cond: teacher.velocity(x, sigma, cond, taps=taps), probe):
        yield Progress(stage=stage, done=done, total=total)
    return {block: torch.cat(found) for block, found in parts.items()}


def _run(shell: WanLiteStudent, block: Block, probe: Probe, which: Tensor, hidden: Tensor) -> Tensor:
    """The block's answer [b, N, D] at the states `which` [b], fed `hidden`."""
    device = shell.patch_embedding.weight.device
    _, e6 = shell._time(flow.TIMESTEPS * probe.sigma[which].to(device))
    text, padding = shell._text(probe.context[which].to(device))
    frames, rows, columns = probe.x.shape[2:]
    rope = rope_table((frames, rows // 2, columns // 2), device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        return block(hidden[which].to(device, torch.float32), e6, rope, text, padding, None)


def _advance(shell: WanLiteStudent, block: Block, probe: Probe, hidden: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat([_run(shell, block, probe, which, hidden).to("cpu", KEPT) for which in torch.arange(len(probe)).split(probe.batch)])


def _train(shell: WanLiteStudent, block: Block, probe: Probe, hidden: Tensor, target: Tensor, steps: int, stage: str, done: int, total: int
           ) -> Generator[Progress, None, None]:
    spread, mean = target.float().std(), target.float().mean()
    scale = (target.float() - hidden.float()).square().mean().clamp_min(1e-12)       # what the span adds is what is to be learned
    with torch.inference_mode(False):
        block.requires_grad_(True)
        peak = LEARNING_RATE / len(block.modulation[0, 0])
        optimizer = torch.optim.AdamW(block.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
    size = max(1, min(len(probe), TOKENS_A_STEP // tokens(probe.x.shape[1:])))
    draw = torch.Generator().manual_seed(done)
    for step in range(steps):
        with torch.inference_mode(False), torch.enable_grad():
            which = torch.randint(len(probe), (size,), generator=draw)
            wanted = target[which].float().to(spread.device)
            keep = (wanted - mean).abs() <= OUTLIER * spread
            answered = _run(shell, block, probe, which, hidden)
            loss = ((answered - wanted.to(answered.device)).square() * keep.to(answered.device)).mean() / scale.to(answered.device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 10) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield Progress(stage=stage, done=done + step, total=total, note=f"loss {float(loss.detach()):.4f}")
    with torch.inference_mode(False):
        block.requires_grad_(False)
