"""Narrower FFNs: the neurons whose absence costs most stay, and the layer behind them is refitted to stand in for the others.

With h the activations after GELU and W = ffn.2.weight, dropping neurons d and keeping k, the refit minimises
E|W_d h_d + b - D h_k - b'|^2 + ridge |D|^2 over the correction D of W_k and the bias b': from the activations' covariance C
and mean m, D = W_d C_dk (C_kk + ridge I)^-1 and b' = b + W_d m_d - D m_k. The ridge pulls towards the plain slice, never
towards zero, so too few states cannot make it worse than that by much, and dropping nothing changes nothing.
"""
from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WanLiteError
from ..formats.neurons import to_mask
from ..teacher import Teacher
from .importance import Probe, answers
from .plan import Progress, check_ffn_dim
from .shelf import Shelf

RIDGE = 0.1                 # of the kept neurons' mean variance: best or close to it from 2 to 8 tokens a neuron
ROWS_AT_ONCE = 4096         # activation rows that are widened to fp32 at a time
MEMORY = 2 << 30            # bytes of second moments held beside the teacher; 14B needs 0.76 GB a block


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FfnCut:
    """What stays of one block's FFN: neurons kept [k], rising, and the refitted ffn.2: weight [D, k], bias [D], in the stored dtypes."""
    kept: Tensor
    weight: Tensor
    bias: Tensor


class Cuts(Mapping[int, FfnCut]):
    """{teacher block: what stays of its FFN}, read from a shelf when it is asked for."""

    def __init__(self, shelf: Shelf, blocks: Sequence[int]) -> None:
        self._shelf, self._blocks = shelf, blocks
        self._last: tuple[int, FfnCut] | None = None            # a block's four tensors are asked for one after the other

    def __getitem__(self, block: int) -> FfnCut:
        if self._last is None or self._last[0] != block:
            self._last = block, FfnCut(**{leaf: self._shelf[f"blocks.{block}.ffn.2.{leaf}"] for leaf in ("kept", "weight", "bias")})
        return self._last[1]

    def masks(self, total: int) -> tuple[str, ...]:
        """Of each block, which of its `total` neurons stay (see formats/neurons.py)."""
        return tuple(to_mask(self._shelf[f"blocks.{block}.ffn.2.kept"].tolist(), total) for block in self._blocks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


class Moments:
    """Mean [F] and covariance [F, F] of activations, summed on the device where they appear: no activation is kept."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, hidden: Tensor, _: Tensor) -> None:
        """A tap on a layer, on ffn.2 here: hidden [B, N, F] is what it is given."""
        with torch.inference_mode(False), torch.no_grad():
            rows = hidden.detach().flatten(0, -2)                                    # [B N, F]
            if not self.count:
                # Sums are taken around a first mean, so that the covariance is not a difference of large numbers.
                self.centre = rows[:ROWS_AT_ONCE].float().mean(dim=0)                # [F]
                self.sum = torch.zeros_like(self.centre)
                self.products = torch.zeros(len(self.centre), len(self.centre), device=rows.device)
            for part in rows.split(ROWS_AT_ONCE):
                part = part.float() - self.centre
                self.sum += part.sum(dim=0)
                self.products.addmm_(part.T, part)
            self.count += len(rows)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(mean [F], covariance [F, F]) in fp64 on the CPU. Raises WanLiteError when the activations were not finite."""
        mean = self.sum.double().cpu() / self.count
        covariance = self.products.cpu().double().div_(self.count).addr_(mean, mean, alpha=-1)
        if not torch.isfinite(covariance).all():
            raise WanLiteError("The teacher's activations are not finite.", "", "Load the teacher in bf16 or fp32.")
        return self.centre.double().cpu() + mean, covariance


def cut_ffn(teacher: Teacher, probe: Probe, keep: Sequence[int], ffn_dim: int, shelf: Shelf, *, memory: int = MEMORY
            ) -> Generator[Progress, None, Cuts]:
    """What stays of the FFN of the blocks in `keep`, measured with the other blocks already gone.

    The probe passes through the teacher once per group of blocks whose moments fit in `memory` bytes; the result does not depend on
    it. Each block's ffn.2, and then what it became, waits on the shelf. Yields once a forward and once a block.
    """
    full, stage = teacher.config.ffn_dim, "Refitting the FFN"
    check_ffn_dim(ffn_dim, full)
    skip = frozenset(range(teacher.config.num_layers)) - set(keep)
    for name, tensor in teacher.weights():
        match = re.fullmatch(r"blocks\.(\d+)\.ffn\.2\.(weight|bias)", name)
        if match and int(match[1]) in keep:
            shelf.put({name: tensor})
            yield Progress(stage=stage, done=0, total=len(keep))
    done, together = 0, max(1, memory // (4 * full * full))
    for start in range(0, len(keep), together):
        group = keep[start:start + together]
        moments = {f"blocks.{block}.ffn.2": Moments() for block in group}
        for _ in answers(lambda x, sigma, cond: teacher.velocity(x, sigma, cond, skip=skip, taps=moments), probe):
            yield Progress(stage=stage, done=done, total=len(keep))
        for path in list(moments):
            with torch.inference_mode(False), torch.no_grad():
                mean, covariance = moments.pop(path).finish()
                cut = refit(weight=shelf[f"{path}.weight"], bias=shelf[f"{path}.bias"], mean=mean, covariance=covariance, ffn_dim=ffn_dim)
            shelf.put({f"{path}.kept": cut.kept, f"{path}.weight": cut.weight, f"{path}.bias": cut.bias})
            done += 1
            yield Progress(stage=stage, done=done, total=len(keep))
    return Cuts(shelf, keep)


def refit(*, weight: Tensor, bias: Tensor, mean: Tensor, covariance: Tensor, ffn_dim: int, ridge: float = RIDGE) -> FfnCut:
    """Keeps the `ffn_dim` neurons of largest std(h) * |W column| and refits; weight [D, F], bias [D], mean [F], covariance [F, F].

    The deviation counts, not the mean: what a neuron adds always alike, the bias takes over exactly.
    """
    with torch.inference_mode(False), torch.no_grad():
        w = weight.double()                                                          # [D, F]
        score = covariance.diagonal().clamp_min(0).sqrt() * w.norm(dim=0)            # [F]
        ranked = score.argsort(descending=True, stable=True)
        kept, dropped = ranked[:ffn_dim].sort().values, ranked[ffn_dim:].sort().values
        within = covariance[kept][:, kept]                                           # [k, k]
        within.diagonal().add_((ridge * within.diagonal().mean()).clamp_min(1e-30))
        across = w[:, dropped] @ covariance[dropped][:, kept]                        # [D, k]
        correction = torch.cholesky_solve(across.T, torch.linalg.cholesky(within)).T
        shift = w[:, dropped] @ mean[dropped] - correction @ mean[kept]              # [D]
        return FfnCut(kept=kept, weight=(w[:, kept] + correction).to(weight.dtype).contiguous(), bias=(bias.double() + shift).to(bias.dtype))
