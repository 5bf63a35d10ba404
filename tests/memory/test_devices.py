"""Which device everything is on, and how often the host waits for it, without one: see card_iteration.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import config_of

from leapalign.config import save_config

SCRIPT = Path(__file__).parents[1] / "support" / "card_iteration.py"
PLACES = (("diagnostics.true_gradient_every=1",), ("memory.optimizer=host",))


@pytest.mark.slow
def test_an_iteration_mixes_no_devices_and_seldom_waits(parts: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.yaml" for number in range(len(PLACES))]
    for file, place in zip(files, PLACES, strict=True):
        save_config(config_of(parts, tmp_path, "optimizer.name=adamw_8bit", *place), file)
    done = subprocess.run([sys.executable, SCRIPT, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert found["images"] == "cpu"
        # The model has about 100 tensors of weights.
        assert found["waits"].get("optimizer", 0) <= 4
        assert sum(found["waits"].values()) < 100
