"""A run that was watched, for the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_runs import train
from watched_runs import other_reward, watched


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, of which all are measured."""
    run = tmp_path_factory.mktemp("watched") / "run"
    train(watched(parts, run, "train.iterations=6", "checkpoint.keep=9", other_reward(parts)))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))
