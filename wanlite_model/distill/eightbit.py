"""AdamW whose two moments take a byte each, for weights in fp32 or in bf16; in plain torch, so that it runs wherever training runs.

Moments in 8 bits with a scale for each block of values are those of Dettmers et al. 2022 (arXiv 2110.02861). The codes here differ:

- The second moment v is kept as its root, in steps of equal ratio (3.9 %) below the largest of its block.
- The first moment m is kept as a fraction of that root, in equal steps. It needs no scale of its own: |m| <= REACH * sqrt(v).
- Both are rounded up or down at random, right on average. Rounded to the nearest code v could stand still: a step takes at most 1 % off it.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .paths import seeded

BETAS, EPS = (0.9, 0.99), 1e-8
REACH = (1 - BETAS[0]) / ((1 - BETAS[1]) * (1 - BETAS[0] ** 2 / BETAS[1])) ** 0.5       # Cauchy-Schwarz, whatever the gradients were
BLOCK = 256                                     # values that share a scale
SMALL = 4096                                    # parameters of fewer values, or not of whole blocks, keep their moments in fp32
STEP = 14 / 255                                 # octaves between two codes of a root
FLOOR = 2 ** (-STEP * 254.9)                    # of a block's largest root is the least that is kept: too large a root makes a small step
TINY = 1e-30                                    # the least scale: nothing is divided by 0
CHUNK = 1 << 21                                 # values worked on at once, whole blocks: it takes some 70 MB
BF16_MAX = torch.finfo(torch.bfloat16).max


class AdamW8(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) as torch computes it, with BETAS and EPS, and 2 bytes of state a value.

    State of a parameter: "first" int8 and "root" uint8 of its shape, "scale" fp32 [values / BLOCK], "step" fp32 []; of a small one what
    torch.optim.AdamW keeps. All rounding is a function of (seed, step, place of the parameter): nothing else need be stored. State is put
    back by assignment: `load_state_dict` would cast it to the dtype of the weights.
    """

    def __init__(self, trained: Iterable[nn.Parameter], lr: float, weight_decay: float, seed: int) -> None:
        super().__init__(trained, {"lr": lr, "weight_decay": weight_decay})
        self.seed = seed
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        self._places = {parameter: (index, group) for index, (parameter, group) in enumerate(pairs)}

    def step(self, closure: None = None) -> None:
        for parameter in self._places:
            if parameter.grad is not None:
                self.step_parameter(parameter)

    @torch.no_grad()
    def step_parameter(self, parameter: nn.Parameter) -> None:
        """The step of one parameter, which has a gradient: for who frees each gradient before the next is there."""
        (index, group), state = self._places[parameter], self.state[parameter]
        if not state:
            state.update(_fresh(parameter))
        state["step"] += 1
        step = int(state["step"])
        bias, root_bias = 1 - BETAS[0] ** step, (1 - BETAS[1] ** step) ** 0.5
        generator = torch.Generator(parameter.device).manual_seed(seeded(self.seed, "rounding", step, index).initial_seed())
        for part in _chunks({"weight": parameter, "gradient": parameter.grad.contiguous(), **_moments(state)}):
            gradient, (first, root) = part["gradient"].float(), _decoded(part)
            first.lerp_(gradient, 1 - BETAS[0])
            # The root of a sum of squares that are never formed: neither a huge nor a tiny gradient leaves fp32.
            torch.hypot(root.mul_(BETAS[1] ** 0.5), gradient * (1 - BETAS[1]) ** 0.5, out=root)
            weight = part["weight"].float()                         # the weight itself where it is fp32
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(first, root + EPS * root_bias, value=-group["lr"] * root_bias / bias)
            noise = torch.rand(weight.shape, generator=generator, device=weight.device)         # one draw a value: chunks change nothing
            if parameter.dtype != torch.float32:
                _round_up(part["weight"], weight, noise)
            _encode(first, root, part, noise, (noise * 256).frac_())                            # its lower digits: as good as new


def stochastic_round_(target: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Puts fp32 values into a bf16 tensor of their shape, rounded up or down at random so that the mean is right.

    What bf16 can hold stays as it is. What is finite stays finite, and what is not becomes NaN.
    """
    _round_up(target, values, torch.rand(values.shape, generator=generator, device=values.device))


def _round_up(target: Tensor, values: Tensor, noise: Tensor) -> None:
    """Away from 0 where what bf16 cuts off, as a share of what it can tell apart, and the noise in [0, 1) reach 1 together."""
    bits = (noise * 65536).int().add_(values.clamp(-BF16_MAX, BF16_MAX).view(torch.int32)).bitwise_and_(-65536)
    torch.add(bits.view(torch.float32), values, alpha=0, out=target)            # 0 times what is not finite is NaN


def packed(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of torch.optim.AdamW ("exp_avg", "exp_avg_sq", "step") -> that of AdamW8, rounded to the nearest codes."""
    state = _fresh(moments["exp_avg"])
    if "exp_avg" in state:
        return dict(moments)
    state["step"].copy_(moments["step"])
    for part in _chunks({**_moments(state), "m": moments["exp_avg"], "v": moments["exp_avg_sq"]}):
        _encode(part["m"].float(), part["v"].float().sqrt(), part, 0.5, 0.5)
    return state


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of AdamW8 -> that of torch.optim.AdamW, fp32, of which `packed` makes the same codes again."""
    if "exp_avg" in state:
        return dict(state)
    first, root = _decoded({key: value.flatten() for key, value in _moments(state).items()})
    return {"exp_avg": first.view_as(state["first"]), "exp_avg_sq": root.square_().view_as(state["root"]), "step": state["step"]}


def _fresh(parameter: Tensor) -> dict[str, Tensor]:
    """The state before the first step."""
    count = parameter.numel()
    if count < SMALL or count % BLOCK:
        moments = {key: torch.zeros_like(parameter, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
    else:
        moments = {"first": torch.zeros_like(parameter, dtype=torch.int8), "root": torch.zeros_like(parameter, dtype=torch.uint8),
                   "scale": torch.zeros(count // BLOCK, device=parameter.device)}
    return {**moments, "step": torch.zeros(())}


def _moments(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != "step"}


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Flat views of the same blocks of all of them."""
    values = max(map(Tensor.numel, tensors.values()))
    pieces = [value.view(-1).split(CHUNK * value.numel() // values) for value in tensors.values()]           # a scale has fewer
    return (dict(zip(tensors, piece)) for piece in zip(*pieces))


def _decoded(part: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(m, sqrt(v)) of a chunk, fp32."""
    if "exp_avg" in part:
        return part["exp_avg"], part["exp_avg_sq"].sqrt()
    root = part["root"].float().mul_(-STEP).exp2_()
    root.view(-1, BLOCK).mul_(part["scale"][:, None])
    return part["first"].float().mul_(REACH / 127).mul_(root), root


def _encode(first: Tensor, root: Tensor, part: Mapping[str, Tensor], first_noise: Tensor | float, root_noise: Tensor | float) -> None:
    """Puts m and sqrt(v) into a chunk of the state. Noise in [0, 1) is added to a code before it is cut off. Uses up `root`."""
    if "exp_avg" in part:
        torch.square(root, out=part["exp_avg_sq"])              # `first` is the state itself
        return
    blocks, scale = root.view(-1, BLOCK), part["scale"]
    scale.copy_(blocks.amax(1).clamp_min_(TINY))
    torch.maximum(blocks, FLOOR * scale[:, None], out=blocks)
    part["first"].copy_((first / root).mul_(127 / REACH).add_(first_noise).floor_().clamp_(-127, 127))
    part["root"].copy_((scale[:, None] / blocks).log2_().div_(STEP).view(-1).add_(root_noise))         # from 0 to 255.9
