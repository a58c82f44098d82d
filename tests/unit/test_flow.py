"""The one definition of the flow: an oracle must come back to x0 through our own sampler."""
import pytest
import torch

from wanlite_model import flow


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_a_perfect_velocity_recovers_x0(steps, shift):
    x0, noise = torch.randn(2, 3, 4, 2, 8, 8, generator=torch.Generator().manual_seed(steps))    # each [B, C, T, H, W]
    found = flow.sample(lambda x, sigma: flow.velocity(x0, noise), noise, flow.schedule(steps, shift))
    torch.testing.assert_close(found, x0)


def test_an_oracle_that_sees_only_the_noisy_latents_recovers_x0():
    """The velocity at (x_t, sigma) follows from x_t alone when x0 is known: sampler, noise and velocity share one convention."""
    x0 = torch.randn(2, 4, 2, 8, 8)
    seen = []

    def oracle(x, sigma):
        seen.append(float(sigma[0]))
        return (x - x0) / sigma.view(-1, 1, 1, 1, 1)

    found = flow.sample(oracle, torch.randn_like(x0), flow.schedule(8, 5.0))
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=1e-5)
    assert seen == pytest.approx(flow.schedule(8, 5.0)[:-1].tolist())


def test_noise_and_x0_can_be_read_back():
    x0, noise, sigma = torch.randn(3, 4, 1, 2, 2), torch.randn(3, 4, 1, 2, 2), torch.tensor([0.1, 0.5, 1.0])
    x_t = flow.add_noise(x0, noise, sigma)
    torch.testing.assert_close(flow.denoised(x_t, flow.velocity(x0, noise), sigma), x0)
    assert torch.equal(flow.add_noise(x0, noise, torch.ones(3)), noise)


def test_guidance_of_one_is_the_prompt_and_of_zero_the_negative():
    v_neg, v_pos = torch.randn(2, 1, 4, 1, 2, 2)
    torch.testing.assert_close(flow.guided(v_neg, v_pos, 1.0), v_pos)
    torch.testing.assert_close(flow.guided(v_neg, v_pos, 0.0), v_neg)
    torch.testing.assert_close(flow.guided(v_neg, v_pos, 3.0), v_pos + 2 * (v_pos - v_neg))


def test_four_steps_at_shift_five_are_the_published_grid():
    assert flow.schedule(4, 5.0).tolist() == pytest.approx([1, 0.9375, 0.83333, 0.625, 0], abs=1e-4)


def test_training_sigmas_follow_the_shift_except_for_the_full_range_share():
    def median(shift, full_range):
        return float(flow.sample_sigma(4000, shift, full_range, torch.Generator().manual_seed(0)).median())

    assert median(1.0, 0.0) == pytest.approx(0.5, abs=0.03)
    assert median(5.0, 0.0) == pytest.approx(5 / 6, abs=0.03)
    assert median(5.0, 1.0) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_schedule_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match="between 1 and 1000"):
        flow.schedule(steps, 1.0)
