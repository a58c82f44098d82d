"""The stand-in for a text encoder: every word is one fixed vector, so a prompt's embedding needs no model."""

import hashlib

import numpy as np
import torch

WIDTH = 4096            # the text width every WAN checkpoint has
MAX_WORDS = 512         # WAN's context length; shorter prompts are padded with zeros
_SCALE = 0.3            # the spread of umt5-xxl's outputs


def embed(prompt: str) -> torch.Tensor:
    """The vectors of the words of `prompt`, float32 [L, 4096]; an empty prompt has L = 0."""
    vectors = [_vector(word) for word in prompt.lower().split()]
    return torch.from_numpy(np.stack(vectors)) if vectors else torch.zeros(0, WIDTH)


def context(prompts: list[str]) -> torch.Tensor:
    """What the model sees: float32 [B, 512, 4096], zero after each prompt's words."""
    padded = torch.zeros(len(prompts), MAX_WORDS, WIDTH)
    for row, prompt in zip(padded, prompts, strict=True):
        words = embed(prompt)
        row[: len(words)] = words
    return padded


def _vector(word: str) -> np.ndarray:
    # PCG64 seeded from SHA-256: the same numbers on every platform and in every process, unlike hash()
    seed = int.from_bytes(hashlib.sha256(word.encode("utf-8")).digest()[:16], "little")
    return (np.random.Generator(np.random.PCG64(seed)).standard_normal(WIDTH) * _SCALE).astype(np.float32)
