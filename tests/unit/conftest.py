"""Fixtures of the tests without ComfyUI."""
from pathlib import Path

import pytest


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """An empty folder for models, where ComfyUI would have it."""
    (tmp_path / "models" / "diffusion_models").mkdir(parents=True)
    return tmp_path / "models" / "diffusion_models"
