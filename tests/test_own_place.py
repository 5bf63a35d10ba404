"""No test sees the folder, the home, the caches or the environment of whoever starts the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import own_place
import pytest

SEEN = "import json, os, pathlib; print(json.dumps([os.environ['HOME'], os.getcwd(), 'HF_TOKEN' in os.environ]))"


def test_the_folder_is_empty_and_its_own() -> None:
    assert Path.cwd().parent == Path(os.environ[own_place.PLACE]).resolve()
    assert not list(Path.cwd().iterdir())
    Path("left").touch()


def test_nothing_is_left_for_the_next() -> None:
    assert not list(Path.cwd().iterdir())


def test_processes_inherit_it() -> None:
    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True)
    place = os.environ[own_place.PLACE]
    assert done.stdout.count(place) == 2
    assert "false" in done.stdout


def test_libraries_have_it() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert Path(constants.HF_HOME).is_relative_to(os.environ[own_place.PLACE])
    assert Path.home() == Path(os.environ["HOME"])


@pytest.mark.slow
def test_a_callers_place_is_not_seen(tmp_path: Path) -> None:
    """Started where a run of the demo lies, with settings of all kinds; fixtures of several tests are no exception."""
    (tmp_path / "runs" / "tiny" / "checkpoints").mkdir(parents=True)
    home = tmp_path / "home"
    home.mkdir()
    hostile = {
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "no token",
        "LEAP_KERNELS": "nonsense",
        "LEAPALIGN_FAULT": "rollout:1",
        "OMP_NUM_THREADS": "0",
    }
    inherited = {name: value for name, value in os.environ.items() if name in own_place.KEPT}
    chosen = [f"{__file__}::{name}" for name in ("test_processes_inherit_it", "test_libraries_have_it")]
    chosen.append(str(Path(__file__).parent / "cli" / "test_cli.py") + "::test_train_then_resume_further")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *chosen],
        env={**inherited, **hostile},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "runs"]
    assert not list(home.iterdir())
