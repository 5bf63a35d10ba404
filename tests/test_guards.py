"""A gradient that is not finite moves nothing, is written down, and does not go on for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import PROMPTS, config_of, parts, weights
from torch import Tensor

from leapalign.checkpoint import latest_checkpoint
from leapalign.run import run_training
from leapalign.run_folder import read_metrics
from leapalign.trainer import SKIPPED_AT_MOST, Trainer
from leapalign.validation import UserError

__all__ = ["parts"]


def failing(trainer: Trainer, calls: set[int]) -> None:
    """Has the reward return nan in these of its calls."""
    (term,) = trainer.rewards
    count = 0

    def reward(images: Tensor, prompts: Any) -> Tensor:
        nonlocal count
        count += 1
        scores = term.reward(images, prompts)
        return scores * float("nan") if count in calls else scores

    trainer.rewards = [type(term)(term.name, reward, term.threshold)]


@pytest.mark.parametrize("places", [(), ("optimizer.name=adamw_8bit", "memory.optimizer=host")])
def test_an_iteration_without_a_finite_gradient_is_skipped(
    parts: Path, tmp_path: Path, places: tuple[str, ...]
) -> None:
    trainer = Trainer.from_config(config_of(parts, tmp_path, "train.iterations=3", *places))
    failing(trainer, {2})
    moved = []
    before = weights(trainer)
    average = [tensor.clone() for tensor in trainer.optimizer.average.tensors]
    for record in trainer.run():
        after = weights(trainer)
        moved.append(not torch.equal(after, before))
        if record["skipped"]:
            assert all(torch.equal(a, b) for a, b in zip(average, trainer.optimizer.average.tensors, strict=True))
        before, average = after, [tensor.clone() for tensor in trainer.optimizer.average.tensors]
    assert moved == [True, False, True]
    assert bool(before.isfinite().all())


def test_incidents_say_what_and_where(parts: Path, tmp_path: Path) -> None:
    trainer = Trainer.from_config(config_of(parts, tmp_path, "train.iterations=3"))
    failing(trainer, {2})
    run_training(trainer)
    (line,) = (tmp_path / "incidents.jsonl").read_text().splitlines()
    incident = json.loads(line)
    assert incident["iteration"] == 2
    assert incident["first_not_finite"] == "reward"
    assert len(incident["prompts"]) == len(incident["noise_seeds"]) == 4
    assert set(incident["prompts"]) <= set(PROMPTS)
    assert [record["skipped"] for record in read_metrics(tmp_path)] == [0, 1, 0]


def test_too_many_in_a_row_end_the_run_with_good_weights(parts: Path, tmp_path: Path) -> None:
    trainer = Trainer.from_config(config_of(parts, tmp_path, "train.iterations=50"))
    failing(trainer, set(range(4, 100)))
    with pytest.raises(UserError, match=r"10 iterations in a row.*incidents\.jsonl"):
        run_training(trainer)
    assert trainer.iteration == 3 + SKIPPED_AT_MOST
    assert latest_checkpoint(tmp_path) is not None
    assert bool(weights(trainer).isfinite().all())
    resumed = Trainer.from_config(config_of(parts, tmp_path, "train.iterations=14"))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    resumed.resume(checkpoint)
    assert bool(weights(resumed).isfinite().all())
