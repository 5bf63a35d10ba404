"""What the tests of prompts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from leapalign.config import ModelConfig
from leapalign.tiny.model import build_pooled_encoder, build_token_encoder, build_transformer, save_model


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    """A random tiny FLUX."""
    save_model(tmp_path / "model", build_transformer(), build_pooled_encoder(), build_token_encoder())
    return ModelConfig(path=str(tmp_path / "model"))
