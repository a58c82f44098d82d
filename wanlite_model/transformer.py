"""The student: a genuine WAN, with WAN's module names, so that its state dict is a WAN file as it is.

Legend: B batch, C channels, T/H/W frames, rows and columns of latent, N = T * H/2 * W/2 tokens, D = dim, L text tokens,
F = 1 or T (timesteps given a sample, or a frame). The architecture is Wan-Video's (Wan 2.1 report, arXiv 2503.20314).
"""
from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .config import CLIP_DIM, EPS, FLF_TOKENS, FREQ_DIM, HEAD_DIM, PATCH, TEXT_DIM, TEXT_LEN, WanConfig
from .errors import WanLiteError
from .formats.card import StudentCard
from .legacy import accepts_legacy, check_keywords
from .mixins import ConfigMixin, ModelMixin, register_to_config
from .pinned import host_memory


# One kernel, which computes in fp32 whatever it is given. Before it was there, torch computed in half precision, or rounded between.
FUSED_RMS_NORM = hasattr(torch.ops.aten, "_fused_rms_norm") and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm", "CUDA")


class RMSNorm(nn.Module):
    """Over all heads at once, computed in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if not FUSED_RMS_NORM:
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), EPS).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):          # which makes all of it fp32 from torch 2.12 on
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPS)


class LayerNorm(nn.LayerNorm):
    """In fp32, returned in fp32: what follows is modulation, which must not round."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Linear32(nn.Linear):
    """In fp32 whatever its dtype and whatever autocast says: for the few small layers whose rounding shows."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class Conv3d32(nn.Conv3d):
    """The same of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.conv3d(x.float(), self.weight.float(), self.bias.float(), stride=self.stride)


class SelfAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x.to(computed_in(self.q, x))                                             # [B, N, D]
        q, k = rotate(heads(self.norm_q(self.q(x))), rope), rotate(heads(self.norm_k(self.k(x))), rope)
        return self.o(attend(q, k, heads(self.v(x))))


class CrossAttention(SelfAttention):
    """Text, and for 2.1's image-to-video a second pair of keys and values for the CLIP tokens."""

    def __init__(self, dim: int, img_emb: bool) -> None:
        super().__init__(dim)
        if img_emb:
            self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), RMSNorm(dim)

    def forward(self, x: Tensor, text: Tensor, padding: Tensor | None, image: Tensor | None) -> Tensor:
        x = x.to(computed_in(self.q, x))                                             # [B, N, D]
        q = heads(self.norm_q(self.q(x)))
        out = attend(q, heads(self.norm_k(self.k(text))), heads(self.v(text)), padding)
        if hasattr(self, "k_img"):
            # Without CLIP tokens ComfyUI splits the text at None, and this pair is given all of it too (comfy/ldm/wan/model.py).
            seen, bias = (text, padding) if image is None else (image, None)
            out = out + attend(q, heads(self.norm_k_img(self.k_img(seen))), heads(self.v_img(seen)), bias)
        return self.o(out)


class Block(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2 = (LayerNorm(dim, EPS, elementwise_affine=False) for _ in range(2))
        self.norm3 = LayerNorm(dim, EPS)
        self.self_attn, self.cross_attn = SelfAttention(dim), CrossAttention(dim, config.img_emb)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor, rope: Tensor, text: Tensor, padding: Tensor | None,
                image: Tensor | None) -> Tensor:
        """x [B, N, D], e [B, F, 6, D] in fp32 -> [B, N, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + e).unbind(2)         # [B, F, D] each
        x = x + gated(self.self_attn(modulated(self.norm1(x), shift1, scale1), rope), gate1)
        x = x + self.cross_attn(self.norm3(x), text, padding, image)
        hidden = modulated(self.norm2(x), shift2, scale2).to(computed_in(self.ffn[0], x))
        return x + gated(self.ffn(hidden), gate2)


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.dim, EPS, elementwise_affine=False)
        self.head = Linear32(config.dim, math.prod(PATCH) * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, N, D], e [B, F, D] in fp32 -> patches [B, N, 4 C]."""
        shift, scale = (self.modulation.float() + e.unsqueeze(2)).unbind(2)          # [B, F, D] each
        return self.head(modulated(self.norm(x), shift, scale))


class ImageEmbedding(nn.Module):
    """CLIP vision tokens [B, 257, 1280] (two pictures: [B, 514, 1280]) -> [B, tokens, D]. A single picture has the places of the first."""

    def __init__(self, dim: int, first_and_last: bool) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(CLIP_DIM), nn.Linear(CLIP_DIM, CLIP_DIM), nn.GELU(), nn.Linear(CLIP_DIM, dim),
                                  nn.LayerNorm(dim))
        if first_and_last:
            self.emb_pos = nn.Parameter(torch.zeros(1, FLF_TOKENS, CLIP_DIM))

    def forward(self, clip_fea: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            clip_fea = clip_fea + self.emb_pos[:, :clip_fea.shape[1]]
        return self.proj(clip_fea.to(self.proj[1].weight.dtype))


class WanLiteStudent(ModelMixin, ConfigMixin):
    """A WAN of any depth, width and FFN width.

    Two forms: keywords (`WanLiteStudent(hidden_size=1024, depth=16)`), which raise WanLiteError on what a WAN cannot honour, and
    a config dict (`WanLiteStudent(config, teacher_checkpoint_path, device, distributed, use_gradient_checkpointing)`), which
    translates an older config and warns field by field. Neither reads or writes a file.

    ffn_dim: None is 4 * hidden_size. in_dim, out_dim: None is num_channels. image_dim: 1280 builds the CLIP branch of 2.1's
    image-to-video. image_size: training resolution in pixels, remembered only.
    """
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    card: StudentCard | None = None         # of the file it was read from; saved with it again
    checkpoints_on_cpu = False              # whether checkpointed blocks' inputs lie in CPU memory until backward

    @accepts_legacy
    @register_to_config
    def __init__(self, model_type: str = "t2v", hidden_size: int = 1536, depth: int = 30, num_heads: int | None = None,
                 num_channels: int = 16, image_size: Any = None, patch_size: Any = PATCH, text_max_length: int = TEXT_LEN,
                 text_encoder_output_dim: int = TEXT_DIM, projection_factor: float = 1.0, ffn_dim: int | None = None,
                 in_dim: int | None = None, out_dim: int | None = None, image_dim: int | None = None) -> None:
        super().__init__()
        self.wan = config = check_keywords(
            model_type=model_type, hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_channels=num_channels,
            patch_size=patch_size, text_max_length=text_max_length, text_encoder_output_dim=text_encoder_output_dim,
            projection_factor=projection_factor, ffn_dim=ffn_dim, in_dim=in_dim, out_dim=out_dim, image_dim=image_dim)
        dim = config.dim
        self.patch_embedding = Conv3d32(config.in_dim, dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(TEXT_DIM, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear32(FREQ_DIM, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.img_emb:
            self.img_emb = ImageEmbedding(dim, first_and_last=config.model_type == "flf2v")
        self.gradient_checkpointing = False
        self._initialise()

    @classmethod
    def from_wan(cls, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> WanLiteStudent:
        """A student of this architecture with fresh weights; on the `meta` device it takes no memory."""
        with torch.device(device or "cpu"):
            return nn.Module.to(cls(**config.to_wanlite()), dtype)             # not diffusers' own, which warns

    @classmethod
    def filled(cls, config: WanConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: torch.device | str) -> WanLiteStudent:
        """A student with these weights, each copied into its place: adopted as they come, what is freed between them would stay in the heap."""
        student = cls.from_wan(config, device="meta")
        state = {name: torch.empty_like(place, dtype=dtype, device=device) for name, place in student.state_dict().items()}
        for name, tensor in tensors:
            state[name].copy_(tensor)
        student.load_state_dict(state, assign=True)
        return student.eval()

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None = None,
                return_features: bool | Collection[int] = False, skip_blocks: Collection[int] = ()
                ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """The velocity [B, C_out, T, H, W] in fp32.

        latents [B, C_in, T, H, W], H and W even; timestep [B] or [B, T], = 1000 sigma in float32; context [B, L <= 512, 4096],
        taken as zero-padded to 512; clip_fea [B, 257, 1280], of two pictures [B, 514, 1280], for a WAN with the CLIP branch, which
        reads the text where there is none, as in ComfyUI. return_features: also {block: its output [B, N, D]}, of all blocks
        or of those named. skip_blocks are passed over as if they were the identity. Raises WanLiteError on shapes no WAN takes.
        """
        self._check(latents, timestep, context, clip_fea)
        x, grid = self._tokens(latents)
        e, e6 = self._time(timestep)
        rope = rope_table(grid, x.device)
        text, padding = self._text(context)
        image = self.img_emb(clip_fea) if clip_fea is not None else None
        wanted = range(len(self.blocks)) if return_features is True else return_features or ()
        shared = {"e": e6, "rope": rope, "text": text, "padding": padding, "image": image}
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        features = {}
        for i, block in enumerate(self.blocks):
            if i not in skip_blocks:
                x = self._checkpointed(block, x, **shared) if recompute else block(x, **shared)
            if i in wanted:
                features[i] = x
        velocity = unpatchify(self.head(x, e), grid, self.wan.out_dim)
        return (velocity, features) if return_features is not False else velocity

    def enable_gradient_checkpointing(self, *_: Any) -> None:
        """Keeps only each block's input for the backward pass and computes the rest again."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **options: Any) -> Any:
        """Writes the folder that four readers open, in the module's dtype; see formats.write.write_student for the options.

        Raises WanLiteError when it cannot, and then nothing on disk has changed.
        """
        from .formats.write import write_student
        options.setdefault("card", self.card)
        if not safe_serialization:
            raise WanLiteError("safe_serialization=False asks for a pickle.", "WanLite writes safetensors only.", "Leave it out.")
        return write_student(Path(save_directory), config=self.wan, tensors=self.state_dict().items(), legacy=self.legacy,
                             image_size=self.config["image_size"], **options)

    @classmethod
    def from_pretrained(cls, path: str | Path, torch_dtype: torch.dtype | None = None,
                        device: torch.device | str = "cpu") -> WanLiteStudent:
        """Opens a saved student, or any WAN 2.1/2.2 file or folder. Raises WanLiteError.

        torch_dtype: None takes the dtype of most of the file for all of it, since a forward computes in one.
        """
        from .formats.read import open_wan
        with open_wan(Path(path)) as source:
            student = cls.filled(source.config, source.tensors(), torch_dtype or source.dtype, device)
        legacy = source.provenance.get("legacy")
        student.legacy, student.card = legacy if isinstance(legacy, dict) else {}, source.card
        student.register_to_config(image_size=source.provenance.get("image_size"))
        return student

    def _check(self, latents: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None) -> None:
        shape = tuple(latents.shape)
        if latents.ndim != 5 or shape[1] != self.wan.in_dim or shape[3] % 2 or shape[4] % 2:
            raise WanLiteError(f"The latents have shape {list(shape)}.",
                               f"This WAN takes [B, {self.wan.in_dim}, T, H, W] with even H and W.")
        if tuple(timestep.shape) not in ((shape[0],), (shape[0], shape[2])):
            raise WanLiteError(f"The timestep has shape {list(timestep.shape)}.", f"It must be [{shape[0]}] or [{shape[0]}, {shape[2]}].")
        if context.ndim != 3 or context.shape[0] != shape[0] or context.shape[1] > TEXT_LEN or context.shape[2] != TEXT_DIM:
            raise WanLiteError(f"The text context has shape {list(context.shape)}.",
                               f"WAN takes [{shape[0]}, up to {TEXT_LEN}, {TEXT_DIM}].", "Encode the prompts with umt5-xxl.")
        if clip_fea is not None:
            self._check_clip(clip_fea, shape[0])

    def _check_clip(self, clip_fea: Tensor, batch: int) -> None:
        if not self.wan.img_emb:
            raise WanLiteError("This WAN has no image branch and takes no clip_fea.")
        most = FLF_TOKENS if self.wan.model_type == "flf2v" else math.inf
        if clip_fea.ndim != 3 or clip_fea.shape[0] != batch or clip_fea.shape[1] > most or clip_fea.shape[2] != CLIP_DIM:
            raise WanLiteError(f"The CLIP tokens have shape {list(clip_fea.shape)}.",
                               f"This WAN takes [{batch}, {FLF_TOKENS // 2} for each picture, {CLIP_DIM}].", "Encode the picture with clip_vision_h.")

    def _checkpointed(self, block: Block, x: Tensor, **shared: Any) -> Tensor:
        """The block's output, with x kept and the rest computed again. What is given by name is not saved: all blocks hold the same tensors."""
        with kept_on_cpu() if self.checkpoints_on_cpu else nullcontext():
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **shared)       # nothing in a block is random

    def _tokens(self, latents: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        x = self.patch_embedding(latents)                                   # [B, D, T, H/2, W/2]
        return x.flatten(2).transpose(1, 2).contiguous(), tuple(x.shape[2:])         # [B, N, D]

    def _time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[B] or [B, T] -> e [B, F, D] for the head and [B, F, 6, D] for the blocks, both fp32."""
        t = timestep.reshape(len(timestep), -1)                                      # [B, F]
        half = FREQ_DIM // 2
        where = float64_device(t.device)
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=where) / half)
        angles = t.to(where).double().unsqueeze(-1) * frequencies
        e = self.time_embedding(torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(t.device))
        return e, self.time_projection(e).unflatten(-1, (6, self.wan.dim))

    def _text(self, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, L, 4096] -> text tokens [B, L', D] and the attention bias [L'] of the last one, which stands for all the padding.

        Padding rows are all zero, hence identical after text_embedding, and n identical keys are one key whose logit is raised by
        log n: the same output for a fraction of the work, since prompts are far shorter than 512 tokens.
        """
        used = context.ne(0).any(dim=-1).any(dim=0).nonzero()
        length = int(used.max()) + 1 if len(used) else 0
        padding = TEXT_LEN - length
        rows = F.pad(context[:, :length], (0, 0, 0, min(padding, 1))).to(self.text_embedding[0].weight.dtype)
        text = self.text_embedding(rows)
        if padding < 2:
            return text, None
        bias = torch.zeros(rows.shape[1], device=text.device)
        bias[-1] = math.log(padding)
        return text, bias

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)


def computed_in(layer: nn.Linear, x: Tensor) -> torch.dtype:
    """The dtype that it takes x in: autocast's, which would cast for each layer anew, or its bias', since a frozen weight may be held in fewer bits."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else layer.bias.dtype


def kept_on_cpu() -> saved_tensors_hooks:
    """While it lasts, what autograd saves is copied to CPU memory, and copied back when backward asks for it.

    From a GPU nothing waits for the copies. All of it is in the order of the stream that computes: a tensor's memory is used again only after its
    copy out, the copy back comes after that, and the CPU never reads what lies in between. A stream of its own would hide the copies, but memory
    that a second stream has read is free only once that is done, and the CPU runs ahead of both: all blocks' inputs would be on the GPU after all.
    """
    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        [kept] = host_memory([tensor], tensor.device)
        return tensor.device, kept.copy_(tensor, non_blocking=tensor.is_cuda)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        origin, kept = packed
        return kept.to(origin, non_blocking=origin.type == "cuda")

    return saved_tensors_hooks(pack, unpack)


def heads(x: Tensor) -> Tensor:
    """[B, L, D] -> [B, heads, L, 128]."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over [B, heads, L, 128] -> [B, L, D]; bias [L] is added to the logits of each key."""
    if bias is not None:
        bias = bias.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def float64_device(device: torch.device) -> torch.device:
    """Where angles are computed: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def rope_table(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """exp(i angle) [N, 64]: 22 pairs turn with the frame, 21 with the row, 21 with the column (RoPE, Su et al. 2021)."""
    third, where = 2 * (HEAD_DIM // 6), float64_device(device)
    angles = []
    for axis, (size, width) in enumerate(zip(grid, (HEAD_DIM - 2 * third, third, third))):
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=where) / width)
        turns = torch.outer(torch.arange(size, dtype=torch.float64, device=where), frequencies)
        shape = [1, 1, 1, -1]
        shape[axis] = size
        angles.append(turns.reshape(shape).expand(*grid, -1))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(table), table).to(torch.complex64).to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns neighbouring pairs of [B, heads, N, 128] by the table's angles, in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))                  # [B, heads, N, 64]
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift of tokens [B, N, D]; shift and scale [B, F, D]: one row for all of them, or each frame's for its own, copied to none."""
    return torch.addcmul(shift.unsqueeze(2), by_frame(x, shift), 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """gate x of tokens [B, N, D]; gate [B, F, D] as there."""
    return (gate.unsqueeze(2) * by_frame(x, gate)).flatten(1, 2)


def by_frame(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens [B, N, D] beside rows [B, F, D] -> [B, F, N / F, D]."""
    return x.unflatten(1, (rows.shape[1], -1))


def unpatchify(patches: Tensor, grid: tuple[int, int, int], channels: int) -> Tensor:
    """[B, N, 4 C] -> [B, C, T, H, W]."""
    t, h, w = grid
    x = patches.reshape(len(patches), t, h, w, *PATCH, channels)                     # [B, t, h, w, 1, 2, 2, C]
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(patches), channels, t * PATCH[0], h * PATCH[1], w * PATCH[2])
