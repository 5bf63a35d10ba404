"""benchmarks/patched_iteration.py takes turns, and leaves the networks as they were."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from leap_kernels import patch

from leapalign.config import load_config
from leapalign.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "patched_iteration.py"
SMALL = ("train.batch_size=2", "rollout.batch_size=2", "rollout.num_steps=3")


def test_turns_are_told_and_undone() -> None:
    spec = importlib.util.spec_from_file_location("patched_iteration", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trainer = Trainer.from_config(load_config(Path("tiny"), SMALL))
    found = script.measured(trainer, turns=2)
    assert found["turns"] == 2
    assert found["quartiles"][0] <= found["factor"] <= found["quartiles"][1]
    assert patch(trainer.model.transformer).replaced
