"""What the tests of prompts share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folders import save_flux

from leapalign.config import ModelConfig


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    """A random tiny FLUX."""
    save_flux(tmp_path / "model")
    return ModelConfig(path=str(tmp_path / "model"))
