"""What several rooms of leapalign's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from installed import wheel_of


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random tiny FLUX, a random CLIP reward and a prompt file."""
    from small_runs import make_parts  # after the environment is set

    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of leapalign, built without a C++ compiler, as it may be, and sooner done."""
    return wheel_of(Path(__file__).parents[1], tmp_path_factory.mktemp("wheel"), compiler=None)
