"""Several rewards at once: their gradients add up as their weights say, and none goes unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import config_of, gradient, train, without_time

from leapalign.inputs.validation import UserError
from leapalign.runs.run_folder import read_metrics
from leapalign.trainer import Trainer


def rewards(parts: Path, *further: str) -> str:
    """The tests' reward as cosine, then as 100 times that, with settings of its own each."""
    path = f"name: pickscore, path: {parts / 'reward'}"
    return f"reward=[{', '.join(f'{{{path}, {settings}}}' for settings in further)}]"


def test_gradients_add_up_by_weight(parts: Path, tmp_path: Path) -> None:
    single = [
        gradient(config_of(parts, tmp_path, f"reward={{name: pickscore, path: {parts / 'reward'}, scale: {scale}}}"))
        for scale in ("cosine", "logit")
    ]
    both = gradient(config_of(parts, tmp_path, rewards(parts, "scale: cosine, weight: 3", "scale: logit, weight: 0.1")))
    torch.testing.assert_close(both, 3 * single[0] + 0.1 * single[1], rtol=1e-4, atol=1e-7)


def test_a_list_of_one_is_the_reward_itself(parts: Path, tmp_path: Path) -> None:
    train(config_of(parts, tmp_path / "one", "train.iterations=2"))
    train(config_of(parts, tmp_path / "list", "train.iterations=2", rewards(parts, "weight: 1.0")))
    first, second = (without_time(read_metrics(tmp_path / name)) for name in ("one", "list"))
    assert first == second


def test_each_reward_has_its_own_threshold_and_metrics(parts: Path, tmp_path: Path) -> None:
    asked = rewards(parts, "threshold: 1.0", "threshold: -9.0, scale: logit, weight: 2")
    train(config_of(parts, tmp_path, asked, "train.iterations=1"))
    (record,) = read_metrics(tmp_path)
    assert record["hinge_closed_pickscore"] == 0
    assert record["hinge_closed_pickscore_2"] == 1
    assert record["hinge_closed"] == 0.5
    assert record["reward_gradient_pickscore"] > 0
    assert record["reward_gradient_pickscore_2"] == 0
    assert record["loss_pickscore_2"] == 0
    assert record["reward"] == pytest.approx(record["reward_pickscore"] + 2 * record["reward_pickscore_2"], rel=1e-5)


def test_equal_gradients_leave_the_say_to_the_weights(parts: Path, tmp_path: Path) -> None:
    """A reward a hundred times as steep dominates, unless gradients are made equal."""
    asked = rewards(parts, "threshold: 1000", "threshold: 1000, scale: logit, weight: 0.5")
    share = {}
    for equal in (False, True):
        output = tmp_path / str(equal)
        train(config_of(parts, output, asked, "train.iterations=1", f"equal_reward_gradients={equal}"))
        (record,) = read_metrics(output)
        share[equal] = record["reward_gradient_pickscore_2"] / record["reward_gradient_pickscore"]
    assert share[False] > 5
    assert share[True] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("reward=[]", "reward.name"),
        ("reward=[{path: x}]", "reward.name"),
        ("reward=[{name: pickscore, weight: -1}]", "weight"),
        ("reward=[{name: pickscore, weigth: 1}]", "weigth"),
        ("reward=pickscore", "reward"),
    ],
)
def test_mistakes_are_one_sentence(parts: Path, tmp_path: Path, asked: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer.from_config(config_of(parts, tmp_path, asked))
