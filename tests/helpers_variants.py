"""The kinds of WAN: the released architectures, tiny ones of each kind, and what a forward of them is given."""
from dataclasses import dataclass

import torch
from torch import Tensor

from wanlite_model.config import WanConfig

LARGE = dict(dim=5120, ffn_dim=13824, num_layers=40)
RELEASED = {
    "t2v 1.3B": WanConfig(dim=1536, ffn_dim=8960, num_layers=30),
    "t2v 14B": WanConfig(**LARGE),                                                  # 2.1's, and each expert of 2.2's T2V-A14B
    "i2v 2.1": WanConfig(model_type="i2v", in_dim=36, img_emb=True, **LARGE),
    "flf2v": WanConfig(model_type="flf2v", in_dim=36, img_emb=True, **LARGE),
    "i2v 2.2": WanConfig(model_type="i2v", in_dim=36, **LARGE),                     # each expert of I2V-A14B
    "ti2v 5B": WanConfig(model_type="ti2v", dim=3072, ffn_dim=14336, num_layers=30, in_dim=48, out_dim=48),
}
# Fields for random_wan: several heads, an odd FFN.
TINY = {
    "t2v": dict(hidden_size=384, depth=2, ffn_dim=301),
    "i2v 2.1": dict(hidden_size=256, depth=3, ffn_dim=301, model_type="i2v", in_dim=36, image_dim=1280),
    "flf2v": dict(hidden_size=256, depth=2, ffn_dim=301, model_type="flf2v", in_dim=36, image_dim=1280),
    "i2v 2.2": dict(hidden_size=128, depth=4, ffn_dim=301, model_type="i2v", in_dim=36),
    "ti2v": dict(hidden_size=256, depth=3, ffn_dim=301, model_type="ti2v", num_channels=48),
}
PICTURES = {"i2v 2.1": 1, "flf2v": 2}           # that the CLIP branch is given


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Given:
    """One forward's inputs: x [B, C_in, T, H, W], t [B] or [B, T], context [B, 512, 4096], clip [B, 257 a picture, 1280] or None."""
    x: Tensor
    t: Tensor
    context: Tensor
    clip: Tensor | None

    @property
    def per_token(self) -> Tensor:
        """The timesteps [B, N] of the tokens, for the readers that want them so."""
        tokens = self.x.shape[3] * self.x.shape[4] // 4
        return self.t.reshape(len(self.t), -1).expand(-1, self.x.shape[2]).repeat_interleave(tokens, dim=1)


def given(in_dim: int, pictures: int = 0, size: tuple[int, int, int] = (5, 6, 10), first_clean: bool = False) -> Given:
    """Two samples. first_clean: a timestep for each frame, 0 for the first, as the 5B has it when that one is a picture."""
    generator = torch.Generator().manual_seed(1)
    context, t = torch.zeros(2, 512, 4096), torch.tensor([900.3, 123.4])
    context[0, :7], context[1, :3] = torch.randn(7, 4096, generator=generator), torch.randn(3, 4096, generator=generator)
    if first_clean:
        t = t.unsqueeze(1).repeat(1, size[0])
        t[:, 0] = 0
    return Given(x=torch.randn(2, in_dim, *size, generator=generator), t=t, context=context,
                 clip=torch.randn(2, 257 * pictures, 1280, generator=generator) if pictures else None)
