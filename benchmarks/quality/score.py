"""What a student is worth: its clips against the teacher's from the same noise, and its velocities on the teacher's states."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo import words
from demo.measure import VAE, sample
from demo.vae import Vae
from demo.world import World
from wanlite_model import flow
from wanlite_model.distill.evaluate import BUCKETS
from wanlite_model.files import replace_file
from wanlite_model.transformer import WanLiteStudent

from .rows import TEACHER_STEPS

AT_ONCE = 16
STATE_PAIRS, STATE_STEPS, STATES_FROM = 32, 16, 5000            # held-out paths, their steps, and the number of the first pair
RENOISED = 8
PART, STATES, VARIED = 64, "states.safetensors", "varied.npz"       # videos in a part of a reference, and its other files
VARIED_PROMPTS, VARIED_SEEDS, VARIED_FROM = 8, 4, 9000          # for the diversity between seeds
SHAPES = {"4x frames": (4, 1, 1), "wide": (1, 0.5, 2), "tall": (1, 1.5, 0.5)}      # of frames, rows and columns


def sampled(model: WanLiteStudent, world: World, pairs: list[tuple[str, Tensor]], steps: int, cfg: float) -> Tensor:
    """Processed latents [N, C, T, H, W]."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(pairs), AT_ONCE):
        prompts, noise = zip(*pairs[start:start + AT_ONCE])
        parts.append(sample(model, prompts, torch.stack(noise).to(device), steps, cfg, world).cpu())
    return torch.cat(parts)


def decoded(vae: Vae, latents: Tensor) -> np.ndarray:
    """Clips [N, T, H, W, 3] as bytes, as a file would hold them."""
    return np.concatenate([(vae.decode(part) * 255).round().byte().numpy() for part in latents.split(AT_ONCE)])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reference:
    """What the teacher does, made once: its clips on the pairs, and its answers on states that nobody trains on."""
    world: World
    pairs: list[tuple[str, Tensor]]
    clips: np.ndarray
    varied: np.ndarray
    states: Mapping[str, Mapping[str, Tensor]]      # {shape name: {x, sigma, v_pos, v_w, prompt}}

    @classmethod
    def of(cls, world: World, count: int, place: Path) -> Reference:
        """From the parts that make_part left in `place`."""
        clips = [np.load(place / part)["clips"] for part in parts(world, count)[2:]]
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in load_file(place / STATES).items():
            name, _, leaf = key.partition("/")
            states.setdefault(name, {})[leaf] = value
        return cls(world=world, pairs=world.pairs(count), clips=np.concatenate(clips)[:count], varied=np.load(place / VARIED)["clips"], states=states)


def parts(world: World, count: int) -> list[str]:
    """The files that a reference of so many pairs is read from; each can be made by itself."""
    return [STATES, VARIED, *(f"clips-{start}.npz" for start in range(0, count, PART))]


def make_part(teacher: WanLiteStudent, vae: Vae, world: World, place: Path, part: str) -> None:
    """Writes one of them, whole or not at all."""
    place.mkdir(parents=True, exist_ok=True)
    if part == STATES:
        found = {f"{name}/{key}": value for name, shape in shapes_of(world).items()
                 for key, value in teacher_states(teacher, world, shape, world.cfg, STATE_PAIRS if name == "own" else 8).items()}
        return replace_file(place / part, lambda path: save_file(found, path))
    pairs = varied_pairs(world) if part == VARIED else world.pairs(PART, first=int(part.removeprefix("clips-").removesuffix(".npz")))
    clips = decoded(vae, sampled(teacher, world, pairs, TEACHER_STEPS, world.cfg))

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, clips=clips)
    replace_file(place / part, write)


def shapes_of(world: World) -> dict[str, tuple[int, int, int, int]]:
    """The world's latent shape, and shapes that no student is trained at."""
    channels, *sizes = world.latents
    return {"own": world.latents, **{name: (channels, *(int(size * factor) for size, factor in zip(sizes, factors)))
                                     for name, factors in SHAPES.items()}}


def varied_pairs(world: World) -> list[tuple[str, Tensor]]:
    """Some prompts, each from several noises."""
    numbered = world.pairs(VARIED_PROMPTS * VARIED_SEEDS, first=VARIED_FROM)
    return [(numbered[i // VARIED_SEEDS][0], noise) for i, (_, noise) in enumerate(numbered)]


@torch.inference_mode()
def teacher_states(teacher: WanLiteStudent, world: World, shape: tuple[int, int, int, int], cfg: float, count: int) -> dict[str, Tensor]:
    """Every other state of the guided teacher's paths, and their ends noised again to even sigmas, since a shifted path has no low ones.

    Returns x, v_pos, v_w [S, C, T, H, W], sigma [S], prompt [S] (a number among world.prompts).
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in ("x", "sigma", "v_pos", "v_w", "prompt")}
    for first in range(0, count, AT_ONCE):
        size = min(AT_ONCE, count - first)
        prompts = [prompt for prompt, _ in world.pairs(size, first=STATES_FROM + first)]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(STATES_FROM + first + i)) for i in range(size)])
        positive, negative = context_of(prompts), context_of([world.negative] * size)
        answers: list[tuple[Tensor, Tensor]] = []

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            v_pos, v_neg = (velocity_of(teacher)(x, sigma, context) for context in (positive, negative))
            answers.append((v_pos, flow.guided(v_neg, v_pos, cfg)))
            return answers[-1][1]

        *path, (x0, _, _) = flow.euler_steps(velocity, noise, flow.schedule(STATE_STEPS, world.shift))
        visited = [(x, sigma) for x, sigma, _ in path]
        for k in range(RENOISED):
            fresh = torch.randn(noise.shape, generator=torch.Generator().manual_seed(STATES_FROM + first + 1000 * (k + 1)))
            visited.append((flow.add_noise(x0, fresh, s := torch.full((size,), (k + 0.5) / RENOISED)), s))
            velocity(*visited[-1])
        for (x, sigma), (v_pos, v_w) in list(zip(visited, answers))[first // AT_ONCE % 2::2]:
            numbers = torch.tensor([world.prompts.index(prompt) for prompt in prompts])
            for name, value in zip(rows, (x, sigma, v_pos, v_w, numbers)):
                rows[name].append(value)
    return {name: torch.cat(values) for name, values in rows.items()}


def context_of(prompts: list[str]) -> Tensor:
    """[B, longest, 4096]."""
    longest = max(1, *(len(words.embed(prompt)) for prompt in prompts))
    return words.context(prompts)[:, :longest]


def velocity_of(model: WanLiteStudent) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, sigma, context) -> the velocity on the CPU, wherever the model is."""
    device = next(model.parameters()).device
    return lambda x, sigma, context: model(x.to(device), flow.TIMESTEPS * sigma.to(device), context.to(device)).cpu()


@torch.inference_mode()
def velocity_scores(model: WanLiteStudent | None, reference: Reference, cfg: float) -> dict[str, float]:
    """error: sum |v - v_w|^2 / sum |v_w|^2 on the world's own shape, per quarter of sigma, and on the other shapes; closure of guidance.

    model: None is the teacher itself, whose answers are there.
    """
    world, found = reference.world, {}
    for name, states in reference.states.items():
        error = []
        for part in torch.arange(len(states["x"])).split(2 * AT_ONCE if name == "own" else AT_ONCE // 2):
            v = states["v_pos" if cfg == 1 else "v_w"][part] if model is None else answered(model, world, states, part, cfg)
            error.append((v - states["v_w"][part]).square().flatten(1).sum(1))
        error, scale = torch.cat(error).double(), states["v_w"].square().flatten(1).sum(1).double()
        found["error" if name == "own" else f"error, {name}"] = float(error.sum() / scale.sum())
        if name == "own":
            bucket = (states["sigma"] * BUCKETS).long().clamp(0, BUCKETS - 1)
            for b in range(BUCKETS):
                found[f"error {b + 1}/4"] = float(error[bucket == b].sum() / scale[bucket == b].sum()) if bool((bucket == b).any()) else math.nan
            gap = (states["v_pos"] - states["v_w"]).square().double().sum()
            found["closure"] = float(1 - error.sum() / gap) if gap > 0 else math.nan
    return found


def answered(model: WanLiteStudent, world: World, states: Mapping[str, Tensor], part: Tensor, cfg: float) -> Tensor:
    """The model's velocities [S, C, T, H, W] on these of the states, guided when cfg is not 1."""
    x, sigma = states["x"][part], states["sigma"][part]
    wanted = velocity_of(model)(x, sigma, context_of([world.prompts[number] for number in states["prompt"][part].tolist()]))
    return wanted if cfg == 1 else flow.guided(velocity_of(model)(x, sigma, context_of([world.negative] * len(part))), wanted, cfg)


def drawn(model: WanLiteStudent, reference: Reference, vae: Vae, steps: int, cfg: float) -> tuple[np.ndarray, np.ndarray]:
    """The model's clips on the pairs, and of some prompts from several noises."""
    world = reference.world
    return tuple(decoded(vae, sampled(model, world, pairs, steps, cfg)) for pairs in (reference.pairs, varied_pairs(world)))


def clip_scores(reference: Reference, clips: np.ndarray, varied: np.ndarray) -> dict[str, float]:
    """Adherence (a count, and a share of the prompts that no student was trained on), PSNR in dB, and ratios to the teacher's clips of
    sharpness, motion, saturation and diversity between seeds.
    """
    world = reference.world
    verdicts = [(right(world, clip, prompt), prompt in world.held_out) for clip, (prompt, _) in zip(clips, reference.pairs)]
    return {"right": sum(well for well, _ in verdicts), "videos": len(clips),
            "right, held out": fmean(well for well, held in verdicts if held) if any(held for _, held in verdicts) else math.nan,
            **compared(clips, reference.clips), "diversity": spread(varied) / spread(reference.varied)}


def right(world: World, clip: np.ndarray, prompt: str) -> bool:
    """Whether the clip shows all that was asked; of a single frame, all but what moves."""
    shown = world.adherence(clip / np.float32(255), prompt)
    return all(value for name, value in shown.items() if len(clip) > 1 or name != world.moving)


def compared(clips: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """psnr, and each statistic as a ratio: ours / theirs."""
    ours, theirs = (frames.astype(np.float32) / 255 for frames in (clips, others))
    error = float(np.square(ours - theirs).mean())
    ratios = {name: statistic(ours) / statistic(theirs) for name, statistic in
              (("sharpness", sharpness), ("motion", motion), ("saturation", saturation)) if name != "motion" or ours.shape[1] > 1}
    return {"psnr": -10 * math.log10(max(error, 1e-12)), **ratios}


def sharpness(clips: np.ndarray) -> float:
    """Mean size of the difference between neighbouring pixels."""
    return float(np.abs(np.diff(clips, axis=2)).mean() + np.abs(np.diff(clips, axis=3)).mean())


def motion(clips: np.ndarray) -> float:
    """Mean size of the difference between neighbouring frames."""
    return float(np.abs(np.diff(clips, axis=1)).mean())


def saturation(clips: np.ndarray) -> float:
    """Mean distance between a pixel's largest and smallest channel."""
    return float((clips.max(-1) - clips.min(-1)).mean())


def spread(clips: np.ndarray) -> float:
    """Root mean square difference between clips of the same prompt from different noise."""
    groups = clips.reshape(VARIED_PROMPTS, VARIED_SEEDS, -1).astype(np.float32) / 255
    return float(np.sqrt(np.square(groups - groups.mean(1, keepdims=True)).mean()))


def open_vae() -> Vae:
    return Vae(VAE)
