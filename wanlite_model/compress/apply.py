"""The student's tensors, streamed from the teacher's: whole blocks by the keep-map, FFN neurons by their cut."""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..config import WanConfig
from ..teacher import Teacher
from .ffn import FfnCut
from .plan import CompressionPlan, interleaved


def start_student(weights: Iterable[tuple[str, Tensor]], plan: CompressionPlan, cuts: Mapping[int, FfnCut] | None = None
                  ) -> Iterator[tuple[str, Tensor]]:
    """The start's (name, tensor) from the teacher's, one at a time and in its dtypes; pruning nothing, the same bit for bit.

    cuts: {teacher block: its FfnCut}, of all kept blocks; without them a narrower FFN is its first neurons, not refitted.
    """
    position = {block: i for i, block in enumerate(plan.keep)}
    for name, tensor in weights:
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None:
            yield name, tensor
        elif (block := int(match[1])) in position:
            narrow = plan.ffn_dim < plan.teacher_ffn_dim and match[2].startswith("ffn.")
            taken = _narrowed(match[2], tensor, plan.ffn_dim, None if cuts is None else cuts[block]) if narrow else tensor
            yield f"blocks.{position[block]}.{match[2]}", taken


def plain_plan(teacher: WanConfig, student: WanConfig) -> CompressionPlan:
    """The plan of the plain cut: interleaved blocks, of each the first neurons."""
    return CompressionPlan(keep=interleaved(teacher.num_layers, student.num_layers), ffn_dim=student.ffn_dim, method="interleaved",
                           teacher_layers=teacher.num_layers, teacher_ffn_dim=teacher.ffn_dim)


def plain_cut(teacher: Teacher, config: WanConfig) -> Iterator[tuple[str, Tensor]]:
    """What a student of the same size is without any thought: the yardstick. Raises WanLiteError on a size beyond the teacher's."""
    return start_student(teacher.weights(), plain_plan(teacher.config, config))


def _narrowed(leaf: str, tensor: Tensor, ffn_dim: int, cut: FfnCut | None) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        kept = torch.arange(ffn_dim) if cut is None else cut.kept
        if leaf in ("ffn.0.weight", "ffn.0.bias"):
            return tensor[kept]
        if leaf == "ffn.2.weight":
            return tensor[:, kept] if cut is None else cut.weight.to(tensor.dtype)
        return tensor if cut is None else cut.bias.to(tensor.dtype)
