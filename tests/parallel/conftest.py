"""Runs of a small model by one process and by two."""

from __future__ import annotations

from pathlib import Path

import process_groups
import pytest
from parallel_runs import config


@pytest.fixture(scope="module")
def one(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    place = tmp_path_factory.mktemp("one")
    return process_groups.trained(config(parts, place / "run"), 1, place)


@pytest.fixture(scope="module")
def two(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two."""
    place = tmp_path_factory.mktemp("two")
    return process_groups.trained(config(parts, place / "run"), 2, place)
