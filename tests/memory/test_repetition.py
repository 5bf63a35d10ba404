"""The seam where a simulation steps in: within it another runs what is repeated, outside it nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import config_of

from leapalign.memory.repetition import repeated, run_by
from leapalign.trainer import Trainer


@repeated
def doubled(value: int, *, plus: int = 0) -> int:
    return 2 * value + plus


def test_another_runs_it_within_the_block_alone() -> None:
    asked: list[Any] = []

    def runner(function: Any, *arguments: Any, **options: Any) -> int:
        asked.append((function.__name__, arguments, options))
        return -1

    assert doubled(3, plus=1) == 7
    with run_by(runner):
        assert doubled(3, plus=1) == -1
    assert doubled(3) == 6
    assert asked == [("doubled", (3,), {"plus": 1})]
    with pytest.raises(ZeroDivisionError), run_by(runner):
        raise ZeroDivisionError
    assert doubled(1) == 2


def test_the_work_of_an_iteration_goes_through_it(parts: Path, tmp_path: Path) -> None:
    """Velocities of the rollout, the reward's gradient, and the vector-Jacobian products: what a simulation replays."""
    trainer = Trainer.from_config(config_of(parts, tmp_path, "rollout.num_steps=3"))
    calls: list[str] = []

    def runner(function: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments, **options)

    with run_by(runner):
        trainer.accumulate_gradients()
    assert calls[:4] == ["evaluated"] * 3 + ["_chunk_gradient"]
    assert set(calls[4:]) == {"velocity_vjp"}
