"""What the creation of a student says in plain words."""
from __future__ import annotations

from dataclasses import dataclass

from ..config import WanConfig
from .depth import DepthChoice
from .plan import CompressionPlan, Method, Refit, format_keep_map

Size = tuple[int, int]      # (parameters, bytes)
TRIED: dict[Method, str] = {"greedy": "greedy removal", "spaced": "spaced greedy removal", "influence": "removal by influence"}
HOW: dict[Method, str] = {
    "greedy": "greedily; removed in this order, with the velocity error after each",
    "spaced": "greedily, neighbours of a removed block last; removed in this order, with the velocity error after each",
    "influence": "by influence; removed at once, with 1 - the mean cosine between what each was fed and what it handed on",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Velocity errors |v - v_teacher| / |v_teacher| before any training, on `states` held-out states; None where not measured.

    choice: how the blocks were chosen, where that took the teacher; asked: the method that was to choose them. refit: of the blocks
    after a gap. block_steps: for which each block was trained by itself. why_not: why nothing was measured.
    """
    asked: Method
    choice: DepthChoice | None = None
    refit: Refit = "none"
    block_steps: int = 0
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
    if measured.refit != "none":
        lines.append(_refitted(plan, measured.refit))
    if measured.block_steps:
        lines.append(f"Each block from the first gap on was trained by itself for {measured.block_steps} steps to hand on what the removed ones did.")
    lines.append(_errors(measured))
    return "\n".join(lines)


def _chosen(plan: CompressionPlan, measured: Measured) -> str:
    if plan.method == "given" or not plan.removed:
        return "as given" if plan.method == "given" else "all of them"
    choice = measured.choice
    if choice is None:
        return "evenly spread, which took no forward"
    cost = f"the choice took {choice.forwards:,} forwards of one state each"
    if plan.method == "interleaved":
        return f"evenly spread, which came out better than {TRIED[measured.asked]}; {cost}"
    score = "{:.4f}" if plan.method == "influence" else "{:.1%}"
    return f"{HOW[plan.method]}: " + ", ".join(f"{block} ({score.format(value)})" for block, value in choice.removals) + f"; {cost}"


def _refitted(plan: CompressionPlan, refit: Refit) -> str:
    """Blocks are named by the teacher's numbers, as in the keep-map."""
    after = format_keep_map(tuple(plan.keep[j] for j in plan.after_gaps))
    if not after:
        return "No kept block comes after a removed one, so there was none to refit."
    what = "the bias of the cross attention took over what was missing on average" if refit == "mean" else \
        "the output layer of the cross attention was fitted to what was missing by least squares"
    return f"Refitted without training: in each kept block after a gap ({after}) {what}."


def _errors(measured: Measured) -> str:
    if measured.error is None:
        return f"Velocity error before distillation: not measured, because {measured.why_not}."
    return (f"Velocity error before distillation, on {measured.states} states that took no part in the choice: {measured.error:.1%}; the plain cut "
            f"of the same size (evenly spread blocks, first neurons, no refit): {measured.plain_cut:.1%}.")


def _size(size: Size) -> str:
    numbers, bytes_ = size
    count = f"{numbers / 1e9:.2f} billion" if numbers >= 1e9 else f"{numbers / 1e6:.2f} million"
    return f"{count} parameters, " + (f"{bytes_ / 1e9:.2f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.1f} MB")
