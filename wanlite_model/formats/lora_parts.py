"""What the parts of a LoRA file add to one layer: of which kind, how large, to which weight, and to some of its neurons only.

A change is {part: tensor} with the parts of lora_keys.py; W is the layer's weight [out, in]. The formulas are those of ComfyUI's
comfy/weight_adapter: LoRA s up @ down; LoHa s (w1_a @ w1_b) * (w2_a @ w2_b); LoKr s kron(w1, w2); diff is added whole; s = alpha / rank.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Change = Mapping[str, Tensor]

WHOLE = {"diff", "diff_b", "set_weight"}        # what stands for itself
BESIDE = {"alpha", "dora_scale"}                # what says how the other parts are meant
LOKR = [{*first, *second} for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}) for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})]
KINDS = {"LoRA": [{"down", "up"}], "LoHa": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}], "LoKr": LOKR,
         "GLoRA": [{"a1.weight", "a2.weight", "b1.weight", "b2.weight"}], "OFT": [{"oft_blocks"}, {"oft_blocks", "rescale"}]}
# The parts whose rows, or columns, are those of W: of other kinds a part of the neurons cannot be cut out.
BY_ROWS = {"up": 0, "hada_w1_a": 0, "hada_w2_a": 0, "diff": 0, "diff_b": 0, "set_weight": 0}
BY_COLUMNS = {"down": 1, "hada_w1_b": 1, "hada_w2_b": 1, "diff": 1, "set_weight": 1}
CUT = {"LoRA", "LoHa"}
ROWS_AT_ONCE = 1024


def kind(parts: Iterable[str]) -> str | None:
    """"LoRA", "LoHa", ..., "DoRA" when it scales rows or columns too, "" for whole differences alone; None when parts are missing."""
    adapter = set(parts) - WHOLE - BESIDE
    if not adapter:
        return None if "dora_scale" in parts or not set(parts) & WHOLE else ""
    found = next((name for name, complete in KINDS.items() if adapter in complete), None)
    return "DoRA" if found and "dora_scale" in parts else found


def shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """(out, in) of the weight that parts of these shapes were made for, 0 where they do not tell; None when they do not fit each other."""
    def product(left: str, right: str) -> tuple[int, int] | None:
        (rows, rank), (rank_too, *columns) = matrix(shapes[left]), matrix(shapes[right])
        return (rows, *columns) if rank == rank_too else None

    def factor(name: str) -> tuple[int, int] | None:
        return matrix(shapes[name]) if name in shapes else product(name + "_a", name + "_b")

    if "up" in shapes:
        return product("up", "down")
    if "hada_w1_a" in shapes:
        first, second = product("hada_w1_a", "hada_w1_b"), product("hada_w2_a", "hada_w2_b")
        return first if first == second else None
    if shapes.keys() & {"lokr_w1", "lokr_w1_a"}:
        first, second = factor("lokr_w1"), factor("lokr_w2")
        return None if first is None or second is None else (first[0] * second[0], first[1] * second[1])
    if "oft_blocks" in shapes:
        *_, blocks, size, _ = (0, 0, 0, *shapes["oft_blocks"])
        return blocks * size, 0
    if "b1.weight" in shapes:           # its older form has the two the other way round
        tall = matrix(shapes["b1.weight"])[0] >= matrix(shapes["b1.weight"])[1]
        return product("b1.weight", "b2.weight") if tall else product("b2.weight", "b1.weight")
    return 0, 0


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of a weight of this shape; a convolution's as ComfyUI flattens it."""
    return shape[0] if shape else 1, math.prod(shape[1:])


def cut(change: Change, *, rows: Tensor | None = None, columns: Tensor | None = None) -> dict[str, Tensor]:
    """The change of these rows or columns of W only; empty where it cannot be cut out of it. What it adds to the bias goes with the rows."""
    axes, index = (BY_ROWS, rows) if rows is not None else (BY_COLUMNS, columns)
    kept = {part: tensor.index_select(axes[part], index) if part in axes else tensor for part, tensor in change.items() if part in WHOLE}
    if kind(change) in CUT:
        kept |= {part: tensor.index_select(axes[part], index) if part in axes else tensor for part, tensor in change.items() if part not in WHOLE}
    return kept


def delta(change: Change) -> Tensor | None:
    """What is added to W [out, in], in fp32; None where that depends on W."""
    name = kind(change)
    if name in ("DoRA", "GLoRA", "OFT") or "set_weight" in change:
        return None
    if "diff" in change:                # ComfyUI lets it take the place of the others
        return _flat(change["diff"])
    if name == "LoRA":
        return _scale(change, "down") * (_flat(change["up"]) @ _flat(change["down"]))
    if name == "LoHa":
        first, second = (change[f"hada_{w}_a"].float() @ change[f"hada_{w}_b"].float() for w in ("w1", "w2"))
        return first.mul_(second).mul_(_scale(change, "hada_w1_b"))
    if name == "LoKr":
        return _lokr_scale(change) * torch.kron(_factor(change, "lokr_w1"), _factor(change, "lokr_w2"))
    return None


def energy(change: Change) -> float | None:
    """The sum of the squares of all that is added, to weight and bias, without making large matrices of it; None where it depends on W.

    |up @ down|^2 = tr((up^T up)(down down^T)), |kron(a, b)|^2 = |a|^2 |b|^2.
    """
    name = kind(change)
    if name in ("DoRA", "GLoRA", "OFT") or "set_weight" in change:
        return None
    total = sum(float(change[part].double().square().sum()) for part in ("diff", "diff_b") if part in change)
    if "diff" in change:
        return total
    if name == "LoRA":
        up, down = _flat(change["up"]), _flat(change["down"])
        total += _scale(change, "down") ** 2 * float(((up.T @ up).double() * (down @ down.T).double()).sum())
    elif name == "LoHa":
        pieces = zip(change["hada_w1_a"].split(ROWS_AT_ONCE), change["hada_w2_a"].split(ROWS_AT_ONCE))
        squares = (delta({**change, "hada_w1_a": first, "hada_w2_a": second}).square().sum(dtype=torch.float64) for first, second in pieces)
        total += float(sum(squares))
    elif name == "LoKr":
        total += _lokr_scale(change) ** 2 * float(torch.stack([_factor(change, w).double().square().sum() for w in ("lokr_w1", "lokr_w2")]).prod())
    return total


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).float() if tensor.ndim > 1 else tensor.float()


def _scale(change: Change, ranked: str) -> float:
    return float(change["alpha"]) / len(change[ranked]) if "alpha" in change else 1.0


def _factor(change: Change, name: str) -> Tensor:
    return change[name].float() if name in change else change[name + "_a"].float() @ change[name + "_b"].float()


def _lokr_scale(change: Change) -> float:
    """ComfyUI scales by the rank of the second factor, else of the first; whole factors are not scaled."""
    ranked = next((name for name in ("lokr_w2_b", "lokr_w1_b") if name in change), None)
    return 1.0 if ranked is None else _scale(change, ranked)
