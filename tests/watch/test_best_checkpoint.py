"""The checkpoint with the highest held-out reward: which it is, that it stays, and how to ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_damage import flip
from command_line import refused
from small_runs import train
from watched_runs import other_reward, watched

from leapalign.cli import main
from leapalign.runs.checkpoint import best_checkpoint, run_weights, save_checkpoint, step_folder
from leapalign.watch.records import FILE, ranked, read_watch, replace_watch


def test_the_order_of_checkpoints_is_that_of_one_metric(tmp_path: Path) -> None:
    values = {0: 9.0, 2: 0.5, 4: 0.7, 6: 0.7, 8: float("nan"), 10: 0.1}
    replace_watch(tmp_path, [{"iteration": n, "other": -n, "held_out_reward": value} for n, value in values.items()])
    assert ranked(tmp_path, "held_out_reward") == [0, 4, 6, 2, 10]
    assert ranked(tmp_path, "other") == [0, 2, 4, 6, 8, 10]
    assert ranked(tmp_path, "none") == []
    assert ranked(tmp_path / "nowhere", "other") == []


def test_the_best_is_by_a_reward_not_trained_on_where_there_is_one(parts: Path, tmp_path: Path) -> None:
    assert watched(parts, tmp_path).watch.best_by == "held_out_reward"
    assert watched(parts, tmp_path, other_reward(parts)).watch.best_by == "held_out_clipscore"


def rewrite(run: Path, values: dict[int, float]) -> None:
    """Changes what was measured."""
    records = read_watch(run)
    replace_watch(run, [{**one, "held_out_clipscore": values[int(one["iteration"])]} for one in records])


def test_the_best_checkpoint_outlives_newer_ones(parts: Path, run: Path) -> None:
    rewrite(run, {0: 999.0, 2: 99.0, 4: 0.1, 6: 0.1})
    config = watched(parts, run, "train.iterations=10", "checkpoint.keep=1", other_reward(parts))
    trainer = train(config, resume=True)
    measured = {int(record["iteration"]): record["held_out_clipscore"] for record in read_watch(run)}
    assert max(measured[8], measured[10]) < 99
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-2"]
    # Once another one is better, it goes.
    save_checkpoint(run, 11, trainer.model.transformer, trainer.optimizer, keep=1, best_first=[0, 10, 2])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-11"]


def test_the_best_weights_can_be_asked_for(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run, {0: 9.0, 2: 0.3, 4: 0.9, 6: 0.1})
    assert run_weights(run, "best") == step_folder(run, 4) / "transformer_ema"
    assert run_weights(run, "average") == step_folder(run, 6) / "transformer_ema"
    output = tmp_path / "exported"
    assert main(["export", "--run", str(run), "--output", str(output), "--weights", "best"]) == 0
    card = (output / "README.md").read_text()
    assert "| iterations | 4 of" in card
    assert "where the held-out reward was highest" in card
    capsys.readouterr()
    flip(step_folder(run, 4) / "transformer_ema" / "config.json")
    assert best_checkpoint(run) == step_folder(run, 2)
    assert f"'{step_folder(run, 4)}' is damaged" in caplog.text
    (run / FILE).unlink()
    arguments = ["--run", str(run), "--prompt", "a circle", "--output", str(tmp_path / "images"), "--weights", "best"]
    assert "no checkpoint that was measured" in refused(["generate", *arguments], capsys)
