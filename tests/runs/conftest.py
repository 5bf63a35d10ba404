"""A short run, for the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_runs import SHORT, config_of, train


@pytest.fixture(scope="module")
def trained(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three iterations, each with a checkpoint and a grid."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(config_of(parts, run, *SHORT))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))
