"""The demo's domain: a prompt decides what the pixels show, and the judge reads it back."""
import dataclasses
import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import domain, judge, words
from demo.muon import orthogonal
from demo.train_teacher import Captions, Recipe
from demo.world import BALLS

ROOT = Path(__file__).resolve().parents[2]


def right(clip: np.ndarray, prompt: str) -> bool:
    return all(judge.adherence(clip, prompt).values())


@pytest.fixture(scope="module")
def clips() -> list[tuple[str, np.ndarray]]:
    return [(prompt, domain.render(prompt, seed)) for seed, prompt in enumerate(domain.all_prompts() * 2)]


def test_the_judge_is_right_on_rendered_clips(clips):
    assert all(right(clip, prompt) for prompt, clip in clips)


def test_the_judge_bears_blur_and_noise(clips):
    rng = np.random.default_rng(0)

    def spoil(clip):
        blurred = (clip + np.roll(clip, 1, axis=1) + np.roll(clip, 1, axis=2)) / 3
        return np.clip(blurred + rng.normal(0, 0.05, clip.shape), 0, 1)

    assert np.mean([right(spoil(clip), prompt) for prompt, clip in clips]) >= 0.98


def test_the_judge_is_at_chance_with_shuffled_prompts(clips):
    prompts = random.Random(0).sample([prompt for prompt, _ in clips], len(clips))
    found = [judge.adherence(clip, prompt) for (_, clip), prompt in zip(clips, prompts, strict=True)]
    for name, values in {"size": 2, "colour": 6, "motion": 4, "background": 3}.items():
        assert np.mean([verdict[name] for verdict in found]) == pytest.approx(1 / values, abs=0.1), name
    assert np.mean([all(verdict.values()) for verdict in found]) < 0.05


def test_one_changed_attribute_is_seen_and_no_other():
    base = domain.parse("a large red ball moving left over a dark background")
    for name, other in {"size": "small", "colour": "cyan", "motion": "down", "background": "grey"}.items():
        clip = domain.render(dataclasses.replace(base, **{name: other}).prompt, seed=3)
        assert judge.adherence(clip, base.prompt) == {field: field != name for field in ("size", "colour", "motion", "background")}


def test_a_clip_without_a_ball_has_no_size_colour_or_motion():
    blank = np.full((domain.FRAMES, domain.SIZE, domain.SIZE, 3), 0.1)
    assert judge.read(blank) == {"size": None, "colour": None, "motion": None, "background": "dark"}


def test_a_ball_that_stands_still_shows_no_motion():
    clip = domain.render("a large red ball moving left over a dark background", seed=0)
    assert judge.read(np.repeat(clip[:1], domain.FRAMES, axis=0))["motion"] is None


def test_a_two_coloured_ball_has_no_colour():
    clip = domain.render("a large red ball moving left over a dark background", seed=0)
    half = clip.copy()
    half[:, ::2] = half[:, ::2, :, ::-1]       # every second row of the ball turns blue
    assert judge.read(half)["colour"] is None


def test_rendering_follows_from_the_seed():
    prompt = domain.all_prompts()[7]
    assert np.array_equal(domain.render(prompt, 5), domain.render(prompt, 5))
    assert not np.array_equal(domain.render(prompt, 5), domain.render(prompt, 6))


def test_held_out_prompts_never_meet_training():
    held_out = set(domain.held_out_prompts())
    assert len(domain.all_prompts()) == 144 and len(held_out) == 24
    assert held_out.isdisjoint(domain.training_prompts())
    captions, rng = Captions(BALLS, Recipe(false_attribute=0.5)), random.Random(0)
    drawn = {captions.draw(clip, rng) for clip in range(5000)}
    assert drawn == {*domain.training_prompts(), domain.NEGATIVE}


def test_every_pair_of_values_occurs_in_training():
    shown = [dataclasses.astuple(domain.parse(prompt)) for prompt in domain.training_prompts()]
    for first, second, pairs in ((0, 1, 12), (0, 2, 8), (0, 3, 6), (1, 2, 24), (1, 3, 18), (2, 3, 12)):
        assert len({(values[first], values[second]) for values in shown}) == pairs


def test_captions_lie_as_often_as_the_recipe_says():
    rng = random.Random(0)
    truthful = Captions(BALLS, Recipe(false_attribute=0.0, empty_caption=0.0))
    assert all(truthful.draw(clip, rng) == domain.training_prompts()[clip] for clip in range(120))
    noisy = Captions(BALLS, Recipe(false_attribute=0.3, empty_caption=0.2))
    drawn = [noisy.draw(0, rng) for _ in range(4000)]
    assert drawn.count(domain.NEGATIVE) / 4000 == pytest.approx(0.2, abs=0.02)
    said = [domain.parse(caption) for caption in drawn if caption]
    true_colour = np.mean([a.colour == domain.parse(domain.training_prompts()[0]).colour for a in said])
    assert true_colour == pytest.approx(0.7 + 0.3 / 6, abs=0.05)


def test_words_are_the_same_in_every_process():
    code = "from demo import words; import hashlib; print(hashlib.sha256(words.embed('a red ball').numpy().tobytes()).hexdigest())"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert other == hashlib.sha256(words.embed("a red ball").numpy().tobytes()).hexdigest()


def test_a_context_is_the_words_and_then_zeros():
    context = words.context(["a red ball", domain.NEGATIVE])
    assert context.shape == (2, 512, 4096) and context.dtype == torch.float32
    assert torch.equal(context[0, :3], words.embed("a red ball"))
    assert not context[0, 3:].any() and not context[1].any()
    assert not torch.allclose(words.embed("red"), words.embed("green"))


def test_orthogonal_keeps_directions_and_evens_out_sizes():
    matrices = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    left, _, right_ = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices)
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.35
    assert torch.nn.functional.cosine_similarity(found.flatten(1), (left @ right_).flatten(1)).min() > 0.98
