"""Prompts with their text embeddings, and pictures where a WAN is shown some, encoded once: afterwards no encoder need be in memory."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .cond import Cond, Shown, batched
from .config import TEXT_DIM, TEXT_LEN, WanConfig
from .errors import WanLiteError
from .files import regular, replace_file

FORMAT = "wanlite.prompts"
HOLDOUT_PROMPTS = 8             # from this many on, whole prompts are held out
MOST_HELD_OUT = 16
AXES = {"image": 4, "clip_fea": 2, "given": 4}         # of what is shown
MOST_ROWS = 8 * TEXT_LEN        # of an embedding before its padding is trimmed
UNREADABLE = (OSError, KeyError, TypeError, json.JSONDecodeError, RuntimeError, SafetensorError)        # what a file that is no bank raises


def parse_prompts(text: str) -> tuple[str, ...]:
    """One prompt a line; blank lines, lines that start with # and repetitions are passed over. Raises WanLiteError when none is left."""
    lines = (line.strip() for line in text.splitlines())
    prompts = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise WanLiteError("There are no prompts.", "One prompt a line; empty lines and lines that start with # do not count.",
                           "Type at least one prompt, better 24 or more that look like what you generate.")
    return prompts


def trim(context: Tensor) -> Tensor:
    """[L, 4096] or [1, L, 4096] without the zero padding at its end; at least one row. Raises WanLiteError on another width or over 512 rows."""
    rows = context.reshape(-1, context.shape[-1]) if context.ndim == 3 and len(context) == 1 else context
    if rows.ndim != 2 or rows.shape[-1] != TEXT_DIM:
        raise WanLiteError(f"The text embedding has shape {list(context.shape)}.", f"WAN reads [1, up to {TEXT_LEN}, {TEXT_DIM}].",
                           "Encode with umt5-xxl: CLIPLoader with type 'wan'.")
    if not 1 <= len(rows) <= MOST_ROWS or rows.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not bool(rows.isfinite().all()):
        raise WanLiteError(f"The text embedding has {len(rows)} rows of {str(rows.dtype)[6:]}, or a value that is not finite.",
                           f"WAN reads up to {TEXT_LEN} rows of numbers.", "Encode the prompts again.")
    used = rows.ne(0).any(dim=-1).nonzero()
    length = int(used.max()) + 1 if len(used) else 1
    if length > TEXT_LEN:
        raise WanLiteError(f"A prompt has {length} tokens.", f"WAN reads {TEXT_LEN} of them.", "Shorten the longest prompt.")
    return rows[:length].clone().contiguous()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptBank:
    """Prompts, one context [L_i, 4096] each (padding trimmed), and the negative prompt with its context [L, 4096].

    shown: what belongs to each prompt beside its text, the same kinds and sizes to all; empty where there is only text. It is rounded to float16.
    Raises WanLiteError when there is no prompt, when an embedding is not WAN's, or when what is shown differs in kind or size.
    """
    prompts: tuple[str, ...]
    contexts: tuple[Tensor, ...]
    negative_text: str
    negative: Tensor
    shown: tuple[Shown, ...] = ()
    _keys: dict[int, str] = field(default_factory=dict, init=False, repr=False)       # found once: pictures are megabytes each

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.contexts):
            raise WanLiteError(f"The prompt bank has {len(self.prompts)} prompts and {len(self.contexts)} embeddings.",
                               "Each prompt has one embedding, and there is at least one.")
        with torch.inference_mode(False):               # what a node made in that mode could not be trained on
            object.__setattr__(self, "contexts", tuple(trim(context) for context in self.contexts))
            object.__setattr__(self, "negative", trim(self.negative))
            rows = [{name: value.to(torch.float16, copy=True).contiguous() for name, value in one.tensors().items()} for one in self.shown]
        sizes = {tuple((name, tuple(value.shape)) for name, value in row.items()) for row in rows}
        if rows and (len(rows) != len(self.prompts) or len(sizes) > 1):
            raise WanLiteError(f"The prompts come with {len(rows)} pictures of {len(sizes)} kinds or sizes.", "Each prompt has its own, and all are alike.",
                               "Encode all pictures at one width, height and length, with CLIP vision for all or for none.")
        for name, value in ((name, value) for row in rows for name, value in row.items()):
            if value.ndim != AXES[name] or not bool(value.isfinite().all()):
                raise WanLiteError(f"What the prompts come with ({name}) has shape {list(value.shape)}, or a value that is not finite.",
                                   f"It has {AXES[name]} axes.", "Encode the prompts and their pictures again.")
        object.__setattr__(self, "shown", tuple(Shown(**row) for row in rows))

    def __len__(self) -> int:
        return len(self.prompts)

    def cond(self, indices: Sequence[int]) -> Cond:
        """The conditions of these prompts; context [B, longest, 4096], all in float32."""
        context = torch.nn.utils.rnn.pad_sequence([self.contexts[i].float() for i in indices], batch_first=True)
        return Cond(context=context, **batched(self.shown[i] for i in indices if self.shown))

    def negative_cond(self, indices: Sequence[int]) -> Cond:
        """The negative prompt with what is shown beside each of these prompts; context [B, L, 4096] in float32."""
        return Cond(context=self.negative.float().expand(len(indices), -1, -1), **batched(self.shown[i] for i in indices if self.shown))

    def key(self, index: int) -> str:
        """A hash of one prompt's embedding and of what is shown with it: what its cached answers depend on."""
        if index not in self._keys:
            self._keys[index] = _hash(self.contexts[index].float(), *(self.shown[index].tensors().values() if self.shown else ()))
        return self._keys[index]

    def fitted(self, config: WanConfig, shape: tuple[int, int, int, int]) -> PromptBank:
        """This bank without what such a WAN is not shown. shape: (C, T, H, W) of its latents.

        Raises WanLiteError when it lacks what the WAN is shown, or when that is of another size, or all of the clip.
        """
        extra, has = config.in_dim - config.out_dim, self.shown[0].tensors() if self.shown else {}
        wanted = {name for name, takes in (("image", extra > 0), ("clip_fea", config.img_emb), ("given", config.model_type == "ti2v")) if takes}
        if extra > 0 and "image" not in has:
            raise WanLiteError(f"This WAN ({config.model_type}) makes videos of pictures, and the prompts come with none.", "",
                               "In WanLite Encode Prompts choose a folder of pictures and connect the VAE, or connect the CONDITIONING of WanImageToVideo.")
        for name, size in (("image", (extra, *shape[1:])), ("given", (shape[0], has["given"].shape[1] if "given" in has else 0, *shape[2:]))):
            if name in wanted & has.keys() and tuple(has[name].shape) != size:
                raise WanLiteError(f"The prompts' pictures are latents of {list(has[name].shape)}, and this WAN at this size is shown {list(size)}.", "",
                                   "Encode the prompts with the LATENT that is connected here, and with this WAN's own VAE.")
        if "given" in wanted & has.keys() and has["given"].shape[1] >= shape[1]:
            raise WanLiteError("The prompts' pictures are the whole clip.", "This WAN is given the first frame, and makes the others.",
                               "Set a longer length on the LATENT, or encode the prompts without pictures.")
        if has.keys() <= wanted:
            return self
        keep = tuple(Shown(**{name: value for name, value in one.tensors().items() if name in wanted}) for one in self.shown)
        return replace(self, shown=keep if keep and keep[0].tensors() else ())

    @property
    def held_out(self) -> tuple[int, ...]:
        """The prompts that students are measured on and never trained on; none where there are fewer than 8, or two that read alike.

        What they say decides it, and what is shown only among those that say the same, so that all jobs on these prompts, one preset after
        another and at whatever size, leave out the same.
        """
        keys = [(_hash(context.float()), self.key(index)) for index, context in enumerate(self.contexts)]
        if len(self) < HOLDOUT_PROMPTS or len(set(keys)) < len(keys):
            return ()
        return tuple(sorted(range(len(self)), key=keys.__getitem__)[:max(2, min(MOST_HELD_OUT, len(self) // 8))])

    @property
    def fingerprint(self) -> str:
        """Changes with any embedding, anything shown, or their order; blind to how a prompt is spelled."""
        keys = [self.key(index) for index in range(len(self))]
        return hashlib.sha256("".join((*keys, _hash(self.negative.float()))).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes one safetensors file, at once."""
        tensors = {f"prompt.{i}": context for i, context in enumerate(self.contexts)} | {"negative": self.negative}
        tensors |= {f"shown.{i}.{name}": value for i, one in enumerate(self.shown) for name, value in one.tensors().items()}
        told = {"format": "pt", FORMAT: json.dumps({"prompts": self.prompts, "negative": self.negative_text})}
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=told))

    @classmethod
    def texts(cls, path: Path) -> tuple[tuple[str, ...], str]:
        """(the prompts, the negative prompt) of a bank, without their embeddings. Raises WanLiteError when the file is not a prompt bank."""
        try:
            with safe_open(regular(path), "pt") as stored:
                told = _told(stored)
                return tuple(told["prompts"]), told["negative"]
        except UNREADABLE as error:
            raise _no_bank(path, error) from error

    @classmethod
    def load(cls, path: Path) -> PromptBank:
        """Raises WanLiteError when the file is not a whole prompt bank."""
        try:
            with safe_open(regular(path), "pt") as stored:
                told = _told(stored)
                names, count = set(stored.keys()), len(told["prompts"])
                contexts = tuple(stored.get_tensor(f"prompt.{i}") for i in range(count))
                # The bank copies all of it: a view would keep the file mapped, and Windows then refuses to replace it.
                shown = tuple(Shown(**{kind.name: stored.get_tensor(f"shown.{i}.{kind.name}") for kind in fields(Shown)
                                       if f"shown.{i}.{kind.name}" in names}) for i in range(count))
                return cls(prompts=tuple(told["prompts"]), contexts=contexts, negative_text=told["negative"],
                           negative=stored.get_tensor("negative"), shown=shown if any(one.tensors() for one in shown) else ())
        except UNREADABLE as error:
            raise _no_bank(path, error) from error


def _told(stored: Any) -> dict[str, Any]:
    """What an open file's header says of a bank: its texts."""
    told = json.loads((stored.metadata() or {})[FORMAT])
    if not all(isinstance(text, str) for text in (*told["prompts"], told["negative"])):
        raise TypeError("a prompt that is no text")
    return told


def _no_bank(path: Path, error: Exception) -> WanLiteError:
    return WanLiteError(f"{path.name} is not a WanLite prompt bank ({error}).", "",
                        "Choose a bank that WanLite Encode Prompts saved, or encode the prompts again.")


def _hash(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(f"{tuple(value.shape)}".encode() + value.numpy().tobytes() for value in tensors)).hexdigest()[:16]
