"""What the creation of a student says in plain words."""
from __future__ import annotations

from dataclasses import dataclass

from ..config import WanConfig
from .plan import CompressionPlan, format_keep_map

Size = tuple[int, int]      # (parameters, bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Velocity errors |v - v_teacher| / |v_teacher| before any training, on `states` held-out states; None where not measured.

    removals: (block, error on the choosing states after its removal), in order. block_steps: for which each block was trained by itself.
    why_not: why nothing was measured.
    """
    block_steps: int = 0
    removals: tuple[tuple[int, float], ...] = ()
    error: float | None = None
    plain_cut: float | None = None
    states: int = 0
    why_not: str = "there were no prompts to measure it with"


def describe(plan: CompressionPlan, measured: Measured, *, teacher_config: WanConfig, teacher: Size, student: Size) -> str:
    """The report, one sentence or two a line."""
    share = student[0] / teacher[0]
    lines = [
        f"Teacher: {teacher_config.num_layers} blocks of {teacher_config.dim}, FFN {teacher_config.ffn_dim}; {_size(teacher)}.",
        f"Student: {len(plan.keep)} blocks of {teacher_config.dim}, FFN {plan.ffn_dim}; {_size(student)}: {share:.0%} of the parameters.",
    ]
    if plan.prunes_nothing:
        return "\n".join((*lines, "Nothing was removed: the student starts as the teacher itself, bit for bit."))
    lines.append(f"Teacher's blocks kept: {format_keep_map(plan.keep)} ({_chosen(plan, measured)}).")
    if plan.ffn_dim < plan.teacher_ffn_dim:
        lines.append(f"FFN: {plan.ffn_dim} of {plan.teacher_ffn_dim} neurons kept in each block, the layer behind them refitted.")
        if plan.ffn_dim % 32:
            lines.append(f"ffn_dim {plan.ffn_dim} is not a multiple of 32, the block that GGUF and fp8 formats count in: such files of this "
                         "student may have to leave its FFN unquantised.")
    if measured.block_steps:
        lines.append(f"Each block from the first gap on was trained by itself for {measured.block_steps} steps to hand on what the removed ones did.")
    lines.append(_errors(measured))
    return "\n".join(lines)


def _chosen(plan: CompressionPlan, measured: Measured) -> str:
    if plan.method == "given" or not plan.removed:
        return "as given" if plan.method == "given" else "all of them"
    if plan.method == "interleaved":
        tried = ", which came out better than greedy removal" if measured.removals else ""
        return f"evenly spread{tried}"
    return "greedily; removed in this order, with the velocity error after each: " + ", ".join(
        f"{block} ({error:.1%})" for block, error in measured.removals)


def _errors(measured: Measured) -> str:
    if measured.error is None:
        return f"Velocity error before distillation: not measured, because {measured.why_not}."
    return (f"Velocity error before distillation, on {measured.states} states that took no part in the choice: {measured.error:.1%}; the plain cut "
            f"of the same size (evenly spread blocks, first neurons, no refit): {measured.plain_cut:.1%}.")


def _size(size: Size) -> str:
    numbers, bytes_ = size
    count = f"{numbers / 1e9:.2f} billion" if numbers >= 1e9 else f"{numbers / 1e6:.2f} million"
    return f"{count} parameters, " + (f"{bytes_ / 1e9:.2f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.1f} MB")
