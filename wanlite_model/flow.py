"""The one definition of WAN's rectified flow (Lipman et al. 2023, Liu et al. 2023; shift: Esser et al. 2024, eq. 23).

    x_t = (1 - sigma) x0 + sigma noise,   v = noise - x0,   t = 1000 sigma,   sigma in [0, 1], 1 = pure noise

Latents are [B, C, T, H, W] in processed space; sigma is [B]. Everything that adds noise, samples, or reads x0 back calls
this file, so that training, caching, evaluation and previews cannot disagree.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TIMESTEPS = 1000            # ComfyUI's and WAN's table length; t = TIMESTEPS * sigma, a float that is not rounded


def _per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.to(like).reshape(-1, *[1] * (like.ndim - 1))                        # [B, 1, 1, 1, 1]


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t [B, C, T, H, W] from clean latents, noise of the same shape, and sigma [B]."""
    s = _per_sample(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The flow's velocity dx/dsigma, which is what a WAN predicts."""
    return noise - x0


def denoised(x_t: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The x0 that a velocity at (x_t, sigma) points to."""
    return x_t - _per_sample(sigma, x_t) * v


def guided(v_neg: Tensor, v_pos: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) as ComfyUI counts it: cfg = 1 is v_pos, no guidance."""
    return v_neg + cfg * (v_pos - v_neg)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Moves uniform sigmas towards noise: shift * s / (1 + (shift - 1) * s); ComfyUI's ModelSamplingSD3."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps: int, shift: float) -> Tensor:
    """ComfyUI's `simple` scheduler: [steps + 1] float32 sigmas from 1 to 0, read off its 1000-entry table."""
    if steps < 1 or steps > TIMESTEPS:
        raise ValueError(f"steps is {steps}; the schedule has between 1 and {TIMESTEPS}.")
    stride = TIMESTEPS / steps
    entries = torch.tensor([TIMESTEPS - int(i * stride) for i in range(steps)] + [0], dtype=torch.float64)
    return shift_sigma(entries / TIMESTEPS, shift).float()


def subdivided(sigmas: Tensor, parts: int, shift: float) -> Tensor:
    """Each step of `sigmas` [K + 1] in `parts` steps, even before the shift: [K * parts + 1]; the given sigmas are among them as they are."""
    if parts == 1:
        return sigmas
    u = (sigmas / (shift - (shift - 1) * sigmas)).double()                          # shift_sigma the other way
    fine = torch.cat([a + (b - a) * torch.arange(parts) / parts for a, b in zip(u[:-1], u[1:])] + [u[-1:]])
    shifted = shift_sigma(fine, shift).to(sigmas)
    shifted[::parts] = sigmas
    return shifted


def sample_sigma(count: int, shift: float, full_range: float, generator: torch.Generator) -> Tensor:
    """Training sigmas [count]: shifted as at deployment, a share `full_range` of them uniform so that denoise < 1 still works."""
    u = torch.rand(count, generator=generator, device=generator.device)
    everywhere = torch.rand(count, generator=generator, device=generator.device) < full_range
    return torch.where(everywhere, u, shift_sigma(u, shift))


def euler_steps(velocity_of: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor
                ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Walks the ODE from noise. Yields (x_t, sigma [B], v) before each step is taken; the last yield is (x0, 0, v) of the end.

    `velocity_of(x [B, C, T, H, W], sigma [B])` is called once per step, len(sigmas) - 1 times.
    """
    x = noise
    v = torch.zeros_like(noise)
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        here = sigma.to(x).expand(len(x))
        v = velocity_of(x, here)
        yield x, here, v
        x = euler_step(x, v, sigma, following)
    yield x, sigmas[-1].to(x).expand(len(x)), v


def euler_step(x: Tensor, v: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    """x [B, C, T, H, W] at `sigma`, taken along v to `following`."""
    return x + (following - sigma).to(x) * v


def sample(velocity_of: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """x0 [B, C, T, H, W] by Euler's method along `sigmas`."""
    x = noise
    for x, _, _ in euler_steps(velocity_of, noise, sigmas):
        pass
    return x
