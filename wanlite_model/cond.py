"""What a WAN is told beside the state it is asked about: the text, and for image-to-video the pictures."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from . import flow


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shown:
    """What belongs to one prompt beside its text, in processed space; None where there is no such thing.

    image [C_in - C, T, H, W]: goes into the network behind the latents; the first 4 channels are the mask, 1 where a frame is known.
    clip_fea [tokens, 1280]: CLIP vision features, 257 tokens a picture. given [C, F, H, W]: the clean latents of the first frames, which 2.2's
    TI2V is told as part of its state, at timestep 0.
    """
    image: Tensor | None = None
    clip_fea: Tensor | None = None
    given: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cond:
    """What velocities are conditioned on. context [B, L <= 512, 4096], to be taken as zero-padded to 512; the rest as in `Shown`, [B, ...] each."""
    context: Tensor
    image: Tensor | None = None
    clip_fea: Tensor | None = None
    given: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, part: slice | Tensor) -> Cond:
        return self._each(lambda value: value[part])

    def to(self, device: torch.device) -> Cond:
        return self._each(lambda value: value.to(device))

    def clone(self) -> Cond:
        return self._each(Tensor.clone)

    def placed(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] with the given frames in their place."""
        if self.given is None:
            return x
        return torch.cat((self.given.to(x), x[:, :, self.given.shape[2]:]), dim=2)

    def asked(self, network: Callable[..., Any], x: Tensor, sigma: Tensor, **options: Any) -> Any:
        """What a WanLiteStudent answers at x [B, C, T, H, W] and sigma [B] under these conditions; all on one device.

        Its velocity is zero where frames are given: there is nothing to learn there, and an Euler step leaves them as they are.
        """
        answered = network(self.input(x), self.timestep(x, sigma), self.context, clip_fea=self.clip_fea, **options)
        if self.given is None:
            return answered
        return self.answer(answered) if isinstance(answered, Tensor) else (self.answer(answered[0]), *answered[1:])

    def input(self, x: Tensor) -> Tensor:
        """[B, C_in, T, H, W] that the network is fed."""
        x = self.placed(x)
        return x if self.image is None else torch.cat((x, self.image.to(x)), dim=1)

    def timestep(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[B], or [B, T] where frames are given: those are clean. In float32."""
        t = flow.TIMESTEPS * sigma.float()
        return t if self.given is None else t.unsqueeze(1) * (torch.arange(x.shape[2], device=t.device) >= self.given.shape[2])

    def made(self, x: Tensor) -> Tensor:
        """The frames of x [B, C, T, H, W] that are not given: what a student is judged by."""
        return x if self.given is None else x[:, :, self.given.shape[2]:]

    def answer(self, velocity: Tensor) -> Tensor:
        """The velocity [B, C, T, H, W], zero where frames are given."""
        return velocity if self.given is None else torch.cat((torch.zeros_like(self.given).to(velocity), velocity[:, :, self.given.shape[2]:]), dim=2)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Cond:
        return Cond(**{field.name: None if (value := getattr(self, field.name)) is None else change(value) for field in fields(self)})


def joined(conds: Sequence[Cond]) -> Cond:
    """One batch after another; contexts of different lengths are padded with zeros, which to a WAN is the same text."""
    rest = {field.name: None if getattr(conds[0], field.name) is None else torch.cat([getattr(cond, field.name) for cond in conds])
            for field in fields(Cond) if field.name != "context"}
    return Cond(context=pad_together(*(cond.context for cond in conds)), **rest)


def chosen(which: Tensor, one: Cond, other: Cond) -> Cond:
    """Row by row `one` where which [B] is true, else `other`: texts only, what is shown is the same in both."""
    both = pad_together(other.context, one.context).unflatten(0, (2, -1))           # [2, B, L, D]
    return Cond(context=torch.where(which.view(-1, 1, 1), both[1], both[0]), image=one.image, clip_fea=one.clip_fea, given=one.given)


def pad_together(*contexts: Tensor) -> Tensor:
    """Stacks contexts [B_i, L_i, D] of different lengths into [sum B_i, max L_i, D], zero-padded."""
    length = max(context.shape[1] for context in contexts)
    return torch.cat([torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[1])) for context in contexts])


def batched(shown: Iterable[Shown]) -> dict[str, Tensor | None]:
    """What is shown with each of some prompts, as the fields of a Cond, in float32."""
    rows = [one.tensors() for one in shown]
    return {name: torch.stack([row[name].float() for row in rows]) for name in (rows[0] if rows else ())}
