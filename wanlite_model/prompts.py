"""Prompts with their text embeddings, encoded once: afterwards the text encoder need not be in memory."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import TEXT_DIM, TEXT_LEN
from .errors import WanLiteError
from .files import replace_file
from .teacher import Cond

FORMAT = "wanlite.prompts"
HOLDOUT_PROMPTS = 8             # from this many on, whole prompts are held out
MOST_HELD_OUT = 16


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
    used = rows.ne(0).any(dim=-1).nonzero()
    length = int(used.max()) + 1 if len(used) else 1
    if length > TEXT_LEN:
        raise WanLiteError(f"A prompt has {length} tokens.", f"WAN reads {TEXT_LEN} of them.", "Shorten the longest prompt.")
    return rows[:length].clone().contiguous()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptBank:
    """Prompts, one context [L_i, 4096] each (padding trimmed), and the negative prompt with its context [L, 4096].

    Raises WanLiteError when there is none, or when an embedding is not WAN's.
    """
    prompts: tuple[str, ...]
    contexts: tuple[Tensor, ...]
    negative_text: str
    negative: Tensor

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.contexts):
            raise WanLiteError(f"The prompt bank has {len(self.prompts)} prompts and {len(self.contexts)} embeddings.",
                               "Each prompt has one embedding, and there is at least one.")
        object.__setattr__(self, "contexts", tuple(trim(context) for context in self.contexts))
        object.__setattr__(self, "negative", trim(self.negative))

    def __len__(self) -> int:
        return len(self.prompts)

    def cond(self, indices: Sequence[int]) -> Cond:
        """The conditions of these prompts; context [B, longest, 4096] in float32."""
        return Cond(context=torch.nn.utils.rnn.pad_sequence([self.contexts[i].float() for i in indices], batch_first=True))

    def negative_cond(self, count: int) -> Cond:
        """The negative prompt, `count` times; context [count, L, 4096] in float32."""
        return Cond(context=self.negative.float().expand(count, -1, -1))

    def context_key(self, index: int) -> str:
        """A hash of one prompt's embedding: what its cached answers depend on."""
        return _hash(self.contexts[index])

    @property
    def held_out(self) -> tuple[int, ...]:
        """The prompts that students are measured on and never trained on; none where there are fewer than 8, or two that read alike.

        What they say decides it and nothing else, so that all jobs on these prompts, one preset after another, leave out the same.
        """
        keys = [self.context_key(index) for index in range(len(self))]
        if len(self) < HOLDOUT_PROMPTS or len(set(keys)) < len(keys):
            return ()
        return tuple(sorted(range(len(self)), key=keys.__getitem__)[:max(2, min(MOST_HELD_OUT, len(self) // 8))])

    @property
    def fingerprint(self) -> str:
        """Changes with any embedding or their order; blind to how a prompt is spelled."""
        return hashlib.sha256("".join(_hash(c) for c in (*self.contexts, self.negative)).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes one safetensors file, at once."""
        tensors = {f"prompt.{i}": context for i, context in enumerate(self.contexts)} | {"negative": self.negative}
        told = {"format": "pt", FORMAT: json.dumps({"prompts": self.prompts, "negative": self.negative_text})}
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=told))

    @classmethod
    def load(cls, path: Path) -> PromptBank:
        """Raises WanLiteError when the file is not a whole prompt bank."""
        try:
            with safe_open(path, "pt") as stored:
                told = json.loads((stored.metadata() or {})[FORMAT])
                contexts = tuple(stored.get_tensor(f"prompt.{i}") for i in range(len(told["prompts"])))
                return cls(prompts=tuple(told["prompts"]), contexts=contexts, negative_text=told["negative"],
                           negative=stored.get_tensor("negative"))
        except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise WanLiteError(f"{path.name} is not a WanLite prompt bank ({error}).", "",
                               "Choose a bank that WanLite Encode Prompts saved, or encode the prompts again.") from error


def _hash(context: Tensor) -> str:
    return hashlib.sha256(f"{tuple(context.shape)}".encode() + context.float().numpy().tobytes()).hexdigest()[:16]
