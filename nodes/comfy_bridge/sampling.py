"""What ComfyUI can sample with, for combos: names only, so that listing nodes loads nothing."""
from __future__ import annotations

import comfy.samplers


def samplers() -> list[str]:
    return list(comfy.samplers.KSampler.SAMPLERS)


def schedulers() -> list[str]:
    return list(comfy.samplers.KSampler.SCHEDULERS)
