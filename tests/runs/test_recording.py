"""What a run shows and needs: bars by stage, grids that can be switched off, room on the disk for all it keeps."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from command_line import refused
from screens import stderr_on_a_terminal
from small_runs import config_of, train
from watched_runs import watched

from leapalign.cli import main
from leapalign.config import save_config
from leapalign.runs.checkpoint import step_folder

usage = namedtuple("usage", "total used free")


def test_bars_say_what_is_running(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_on_a_terminal(monkeypatch)
    train(watched(parts, tmp_path, "train.iterations=2", "rollout.batch_size=2"))
    shown = terminal.descriptions()
    assert {"load the model", "load the rewards", "samples", "watch"} <= shown
    assert {f"encode {what}, text encoder {n}" for what in ("prompts", "watch.prompts") for n in (1, 2)} <= shown
    assert {"train, optimizer", *(f"train, rollout {n}/2" for n in (1, 2))} <= shown
    assert {"train, reward 1/2", "train, surrogate 2/2"} <= shown
    assert not any("3/2" in name or "0/2" in name for name in shown)
    assert sum("train" in line for line in terminal.lines()) == 1


def test_bars_keep_out_of_json(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(config_of(parts, tmp_path / "run", "train.iterations=1"), tmp_path / "config.yaml")
    terminal = stderr_on_a_terminal(monkeypatch)
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["iteration"] == 1
    assert "train, optimizer" in terminal.descriptions()


def test_grids_can_be_switched_off(parts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config_of(parts, run, "samples.every=0", "train.iterations=1"))
    assert not (run / "samples").exists()
    train(config_of(parts, run, "samples.every=2", "train.iterations=2"), resume=True)
    assert [path.name for path in (run / "samples").iterdir()] == ["step-2.png"]


def test_a_grid_of_iterations_that_are_done_again_is_gone(parts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config_of(parts, run, "train.iterations=2", "samples.every=2"))
    (run / "samples" / "step-3.png").touch()  # of a process that was killed before its checkpoint
    train(config_of(parts, run, "train.iterations=4", "samples.every=4"), resume=True)
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-0.png", "step-2.png", "step-4.png"]


@pytest.mark.parametrize(
    ("assignments", "at_once"),
    [
        (("train.iterations=6", "checkpoint.every=1", "checkpoint.keep=2"), 3),
        (("train.iterations=6", "checkpoint.every=2", "checkpoint.keep=2", "watch.every=2"), 3),
        (("train.iterations=6", "checkpoint.every=1", "checkpoint.keep=2", "watch.every=1"), 4),
        (("train.iterations=5", "checkpoint.every=2", "checkpoint.keep=9"), 3),
        (("train.iterations=1",), 1),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_room_for_all_a_run_keeps_is_asked_for_before_training(
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    assignments: tuple[str, ...],
    at_once: int,
    name: str,
) -> None:
    path, run = tmp_path / "config.yaml", tmp_path / "made" / "run"
    save_config(watched(parts, run, "watch.every=0", f"optimizer.name={name}", *assignments), path)
    free = [1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free[0]))
    monkeypatch.setattr("leapalign.trainer.embeddings_of", lambda *_: pytest.fail("long work"))
    error = refused(["train", "--config", str(path)], capsys)
    assert "a checkpoint needs 0.0" in error
    assert (f"there will be {at_once} more at once" in error) is (at_once > 1)
    assert "GiB free; make room, or lower checkpoint.keep" in error
    assert not run.parent.exists()


def test_what_a_checkpoint_takes_is_known_before_the_first_iteration(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moments included, which AdamW of PyTorch makes in its first step."""
    run = tmp_path / "run"
    asked = ("optimizer.name=adamw", "train.iterations=1", "samples.every=0")
    train(config_of(parts, run, *asked))
    capsys.readouterr()
    real = sum(path.stat().st_size for path in step_folder(run, 1).rglob("*") if path.is_file())
    path = tmp_path / "config.yaml"
    save_config(config_of(parts, tmp_path / "other", *asked), path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, real - 1))
    assert "a checkpoint needs" in refused(["train", "--config", str(path)], capsys)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, real + (1 << 20)))
    assert main(["train", "--config", str(path)]) == 0
