"""A start on disk, walked block by block: one block's weights are on the device at a time, and what it hands on is kept for the next.

That is how a model gets healed that would not fit there as a whole. A block is fed what the student before it hands on, not what the
teacher would: it can make up for the blocks before it as well.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from ..config import WanConfig
from ..formats.keymap import wan_shapes
from ..teacher import Teacher
from ..transformer import Block, WanLiteStudent, rope_table
from .importance import Probe, answers, tokens
from .plan import CompressionPlan, Progress

KEPT = torch.float16            # of activations between blocks: rounding 2**-11
AT_WORK = 112                   # bytes for each number of a token that training a block takes at the most, beside the weights
MEMORY = 2 << 30                # bytes of the teacher's activations held at a time


def room(teacher: WanConfig, ffn_dim: int, probe: Probe) -> int:
    """Bytes of the device that a block of a start takes, with all that trains it and a forward's worth of the probe's states, in fp32."""
    shapes = wan_shapes(teacher.resized(num_layers=1, ffn_dim=ffn_dim))
    shell, block = (sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(start)) for start in ("", "blocks."))
    return 4 * (shell + 3 * block) + AT_WORK * teacher.dim * probe.batch * tokens(probe.x.shape[1:])


Read = Callable[[str], Tensor]              # a tensor of the start by its name
Keep = Callable[[dict[str, Tensor]], None]  # takes tensors that have changed, by name and in their dtypes


class Walk:
    """The probe's states before one block of the start after another. hidden [S, N, D]: what the next block is fed.

    read: the start's tensors. A student of one block, whose weights change places, stands on the device; all else in it is the start's own.
    """

    def __init__(self, read: Read, plan: CompressionPlan, teacher: Teacher, probe: Probe) -> None:
        self._read, self._probe, self._teacher, self._device = read, probe, teacher, teacher.device
        self._room = room(teacher.config, plan.ffn_dim, probe)
        teacher.release(self._room)              # a card that is too small for it would be full of it
        with torch.inference_mode(False), torch.no_grad():
            shell = WanLiteStudent.from_wan(teacher.config.resized(num_layers=1, ffn_dim=plan.ffn_dim), device="meta")
            state = {name: read(name).to(teacher.device, torch.float32, copy=True) for name in shell.state_dict()}
            shell.load_state_dict(state, assign=True)
            self._shell, self.block = shell.requires_grad_(False), shell.blocks[0]
            self.hidden = torch.cat([self._fed(which).to("cpu", KEPT) for which in self.parts()])

    @property
    def together(self) -> int:
        """How often what is kept of all states fits in MEMORY."""
        return max(1, MEMORY // (self.hidden.numel() * KEPT.itemsize))

    def enter(self, j: int) -> Block:
        """The start's block j, with the weights that it has now."""
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self.block.state_dict().items():
                value.copy_(self._read(f"blocks.{j}.{name}"))
        return self.block

    def parts(self) -> Sequence[Tensor]:
        """The numbers of the states, those together that share a forward."""
        return torch.arange(len(self._probe)).split(self._probe.batch)

    def answer(self, which: Tensor) -> Tensor:
        """What the block hands on [b, N, D] at the states `which` [b]."""
        shell, probe = self._shell, self._probe
        cond = probe.cond[which].to(self._device)
        _, e6 = shell._time(cond.timestep(probe.x, probe.sigma[which].to(self._device)))
        text, padding = shell._text(cond.context)
        image = None if cond.clip_fea is None else shell.img_emb(cond.clip_fea)
        frames, rows, columns = probe.x.shape[2:]
        rope = rope_table((frames, rows // 2, columns // 2), self._device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda"):
            return self.block(self.hidden[which].to(self._device, torch.float32), e6, rope, text, padding, image)

    def _fed(self, which: Tensor) -> Tensor:
        """What the first block is fed [b, N, D] at the states `which` [b]."""
        return self._shell._tokens(self._probe.cond[which].input(self._probe.x[which]).to(self._device))[0]

    def advance(self) -> None:
        """Goes behind the block: what it hands on is what the next one is fed."""
        with torch.inference_mode(False), torch.no_grad():
            self.hidden = torch.cat([self.answer(which).to("cpu", KEPT) for which in self.parts()])

    def recorded(self, paths: Sequence[str], told: Progress, *, given: bool = False) -> Generator[Progress, None, dict[str, Tensor]]:
        """{module path: what the teacher's module hands on, or is given, at each state [S, N, D]}. Yields `told` once a forward."""
        parts: dict[str, list[Tensor]] = {path: [] for path in paths}
        taps = {path: lambda fed, answered, path=path: parts[path].append((fed if given else answered).detach().to("cpu", KEPT)) for path in paths}
        for _ in answers(lambda x, sigma, cond: self._teacher.velocity(x, sigma, cond, taps=taps), self._probe):
            yield told
        self._teacher.release(self._room)
        return {path: torch.cat(parts.pop(path)) for path in paths}             # one at a time is there twice
