"""Runs of a small model by one process and by two, made once."""

from __future__ import annotations

from pathlib import Path

import process_groups
import pytest
from parallel_runs import config


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As that of all tests, for the whole session."""
    from small_runs import make_parts  # after the environment is set

    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


@pytest.fixture(scope="session")
def one(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    place = tmp_path_factory.mktemp("one")
    return process_groups.trained(config(parts, place / "run"), 1, place)


@pytest.fixture(scope="session")
def two(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two."""
    place = tmp_path_factory.mktemp("two")
    return process_groups.trained(config(parts, place / "run"), 2, place)
