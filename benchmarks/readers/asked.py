"""One forward: what it is given, as a network takes it and as a teacher does, and how far apart two answers are."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from helpers_variants import PICTURES, Given, given
from torch import Tensor, nn

from wanlite_model.cond import Cond
from wanlite_model.config import WanConfig

SIZE = (3, 4, 6)                        # frames, rows, columns of latent
SIGMA = torch.tensor([0.9003, 0.1234])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Asked:
    """Two samples. network: what a network is fed. x [B, C, T, H, W], sigma [B], cond: what a teacher is asked."""
    network: Given
    x: Tensor
    sigma: Tensor
    cond: Cond

    @classmethod
    def of(cls, variant: str, config: WanConfig) -> Asked:
        """For 2.1's image-to-video with CLIP features, for 2.2's TI2V with a first frame that is given, at timestep 0."""
        network = given(config.in_dim, PICTURES.get(variant, 0), SIZE)
        x, beside = network.x[:, :config.out_dim], network.x[:, config.out_dim:]
        cond = Cond(context=network.context, image=beside if beside.shape[1] else None, clip_fea=network.clip, given=x[:, :, :1] if variant == "ti2v" else None)
        return cls(network=replace(network, t=cond.timestep(x, SIGMA)), x=x, sigma=SIGMA, cond=cond)

    def answered(self, module: nn.Module) -> Tensor:
        """What a WanLiteStudent answers [B, C, T, H, W]."""
        with torch.no_grad():
            return module(self.network.x, self.network.t, self.network.context, self.network.clip)

    def apart(self, velocity: Tensor, expected: Tensor) -> float:
        """The largest difference, as a share of the largest value, over the frames that are not given."""
        velocity, expected = self.cond.made(velocity.float()), self.cond.made(expected)
        found = float((velocity - expected).abs().max() / expected.abs().max())
        return math.inf if math.isnan(found) else found
