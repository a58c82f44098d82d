"""Trains a world's teacher: a genuine WAN on cached latents of the world's clips.

The captions lie on purpose: each attribute is replaced by a random one now and then, and some captions are empty. A model
that believes them as far as they deserve shows the wrong attribute at times, and only guidance sharpens it.
"""

import dataclasses
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from wanlite_model import flow
from wanlite_model.transformer import WanLiteStudent

from . import words
from .muon import Muon
from .workers import COUNT, Workers
from .world import World

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides the teacher's weights."""

    steps: int = 2750
    batch: int = 32
    clips_per_prompt: int = 16
    muon_lr: float = 4e-3           # the matrices
    adam_lr: float = 2e-3           # everything else
    warm_up: int = 50
    ema: float = 0.998
    false_attribute: float = 0.15   # chance that a caption's attribute is drawn anew, each on its own
    empty_caption: float = 0.10
    full_range: float = 0.25        # share of sigmas that ignore the shift
    seed: int = 0


def encode_clips(world: World, recipe: Recipe, encode: Callable[[torch.Tensor], torch.Tensor], path: Path, workers: Workers) -> None:
    """Renders training clips and writes their latents, float16 [N, C, T, H, W] in processed space; clip i shows training prompt i % their number."""
    prompts = world.training

    def encode_part(indices: range) -> torch.Tensor:
        clips = [world.render(prompts[i % len(prompts)], recipe.seed + 1_000_000 + i) for i in indices]
        return encode(torch.stack([torch.from_numpy(clip) for clip in clips])).half()

    count = len(prompts) * recipe.clips_per_prompt
    parts = workers.map(encode_part, [range(start, start + 4) for start in range(0, count, 4)])
    save_file({"latents": torch.cat(parts)}, path)


def train(world: World, recipe: Recipe, latents_path: Path, work: Path, workers: Workers,
          evaluate: Callable[[WanLiteStudent], object], start: WanLiteStudent | None = None) -> WanLiteStudent:
    """Trains, or goes on from `work`'s checkpoint, and returns the averaged model. Every 500 steps logs what `evaluate` says of it.

    start: a trained WAN to begin with, else a fresh one.
    """
    torch.manual_seed(recipe.seed)
    latents = load_file(latents_path)["latents"].float()                                # [N, C, T, H, W]
    captions = Captions(world, recipe)
    model = (fresh_teacher(world) if start is None else start).train()
    average = fresh_teacher(world).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "head.head.weight"]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or name == "head.head.weight"]
    optimizers = {"muon": Muon(matrices, workers, lr=recipe.muon_lr),
                  "adam": torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)}
    step = _resume(work / "teacher.pt", model, average, optimizers)
    started, running = time.monotonic(), 0.0
    while step < recipe.steps:
        _set_lr(optimizers, recipe, step)
        loss = _train_step(model, optimizers, latents, captions, world.shift, recipe, step, workers)
        _average(average, model, min(recipe.ema, (1 + step) / (10 + step)))
        step += 1
        running += loss
        if step % 50 == 0:
            log.info("step %d: loss %.4f, %.0f s", step, running / 50, time.monotonic() - started)
            running = 0.0
        if step % 250 == 0:
            _save(work / "teacher.pt", model, average, optimizers, step)
        if step % 500 == 0:
            log.info("step %d: %s", step, evaluate(average))
    return average


class Captions:
    """Training captions as the model sees them: noisy, never one of the held-out prompts."""

    def __init__(self, world: World, recipe: Recipe) -> None:
        self._world, self._prompts = world, world.training
        self._allowed = set(self._prompts)
        self._vectors = {prompt: words.embed(prompt) for prompt in self._prompts}       # [L, 4096], L the same for all
        self._vectors[world.negative] = torch.zeros_like(self._vectors[self._prompts[0]])
        self._recipe = recipe

    def draw(self, clip: int, rng: random.Random) -> str:
        """A caption for the clip: true, false in some attributes, or empty."""
        if rng.random() < self._recipe.empty_caption:
            return self._world.negative
        true = self._prompts[clip % len(self._prompts)]
        told = self._world.corrupted(true, rng, self._recipe.false_attribute)
        return told if told in self._allowed else true

    def context(self, clips: list[int], rng: random.Random) -> torch.Tensor:
        """[B, L, 4096]; the model takes what is missing to 512 rows as zeros."""
        return torch.stack([self._vectors[self.draw(clip, rng)] for clip in clips])


def fresh_teacher(world: World) -> WanLiteStudent:
    """The untrained teacher, its cross-attention turned towards words.

    A prompt has ten words and some five hundred rows of padding. At a random start the padding gets 98% of the attention
    and the text is learned late; here each block's query bias points at the words' mean key.
    """
    model = WanLiteStudent.from_wan(world.config)
    vocabulary = words.embed(" ".join(sorted({word for prompt in world.prompts for word in prompt.split()})))
    with torch.no_grad():
        layer = model.text_embedding[2]
        layer.weight.div_(model.text_embedding(vocabulary).square().mean().sqrt())      # words of unit size
        text = model.text_embedding(vocabulary)                                         # [words, D]
        for block in model.blocks:
            attention = block.cross_attn
            key = attention.norm_k(attention.k(text)).mean(0)
            attention.q.bias.copy_(2 * key / key.square().mean().sqrt())
    return model


def _train_step(model, optimizers, latents, captions: Captions, shift: float, recipe: Recipe, step: int,
                workers: Workers) -> float:
    rng = random.Random(f"{recipe.seed}/{step}")        # nosec B311  # the batch, the captions and the noise follow from the step
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    clips = [rng.randrange(len(latents)) for _ in range(recipe.batch)]
    x0 = latents[clips]                                                                 # [B, C, T, H, W]
    noise = torch.randn(x0.shape, generator=generator)
    sigma = flow.sample_sigma(recipe.batch, shift, recipe.full_range, generator)
    context = captions.context(clips, rng)                                              # [B, L, 4096]
    parameters = list(model.parameters())

    def part(x0, noise, sigma, context):
        predicted = model(flow.add_noise(x0, noise, sigma), flow.TIMESTEPS * sigma, context)
        loss = (predicted - flow.velocity(x0, noise)).square().sum() / noise_size
        return loss.detach(), torch.autograd.grad(loss, parameters)

    noise_size = noise.numel()
    losses, gradients = zip(*workers.map(part, *(tensor.chunk(COUNT) for tensor in (x0, noise, sigma, context))), strict=True)
    for parameter, *parts in zip(parameters, *gradients, strict=True):
        parameter.grad = sum(parts)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers.values():
        optimizer.step()
    return sum(losses).item()


def _set_lr(optimizers, recipe: Recipe, step: int) -> None:
    left = 1 - step / recipe.steps
    factor = min(1.0, (step + 1) / recipe.warm_up, left / 0.4)                          # flat, then straight down to zero
    for name, peak in (("muon", recipe.muon_lr), ("adam", recipe.adam_lr)):
        for group in optimizers[name].param_groups:
            group["lr"] = peak * factor


@torch.no_grad()
def _average(average: WanLiteStudent, model: WanLiteStudent, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _save(path: Path, model, average, optimizers, step: int) -> None:
    state = {"model": model.state_dict(), "average": average.state_dict(), "step": step,
             "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _resume(path: Path, model, average, optimizers) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    return state["step"]
