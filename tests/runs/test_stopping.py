"""Stopping a run, and running it twice."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import child_runs
import pytest
import yaml
from signals import signalled_in
from small_runs import config_of, train

from leapalign.cli import main
from leapalign.config import save_config
from leapalign.inputs.validation import UserError
from leapalign.runs.checkpoint import latest_checkpoint, step_folder
from leapalign.runs.run_folder import read_metrics
from leapalign.runs.stopping import stop_requests
from leapalign.storage.folder_lock import LOCK, run_lock

SHORT = ("optimizer.name=adamw_8bit", "train.iterations=4", "checkpoint.every=4", "samples.count=1")
BOTH = [signal.SIGTERM, signal.SIGINT]


def configured(parts: Path, run: Path) -> list[str]:
    """The command line that trains ``run``."""
    path = run.with_suffix(".yaml")
    save_config(config_of(parts, run, *SHORT), path)
    return ["train", "--config", str(path)]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_there(
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    before = [signal.getsignal(number) for number in BOTH]
    signalled_in(monkeypatch, 3, number)
    assert main(configured(parts, run)) == 0
    assert f"stopped after iteration 3; continue with leapalign train --resume {run}" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in BOTH] == before
    assert latest_checkpoint(run) == step_folder(run, 3)
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0
    assert [record["iteration"] for record in read_metrics(run)] == [1, 2, 3, 4]
    train(config_of(parts, whole, *SHORT))
    one, other = ((step_folder(folder, 4) / "manifest.json").read_bytes() for folder in (run, whole))
    assert one == other


def test_a_second_interrupt_ends_at_once(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    before = [signal.getsignal(number) for number in BOTH]
    signalled_in(monkeypatch, 2, signal.SIGINT, signal.SIGINT)
    assert main(configured(parts, run)) == 130
    assert latest_checkpoint(run) is None
    assert [signal.getsignal(number) for number in BOTH] == before


def test_a_second_sigterm_does_not_interrupt() -> None:
    with stop_requests() as stopping:
        assert not stopping()
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stopping()


def test_other_threads_train_without_signals() -> None:
    answers: list[bool] = []

    def work() -> None:
        with stop_requests() as stopping:
            answers.append(stopping())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


def hold(run: Path, held: Path) -> None:
    """Holds the lock of ``run`` until killed; ``held`` appears when it does."""
    with run_lock(run):
        held.touch()
        signal.pause()


@pytest.mark.posix
def test_a_folder_in_use_is_refused_by_pid_and_free_after_kill_9(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run, held = tmp_path / "run", tmp_path / "held"
    run.mkdir()
    save_config(config_of(parts, run, *SHORT), run / "config.yaml")
    process = child_runs.started(hold, run, held)
    while not held.exists():
        process.join(timeout=0.05)
        assert process.is_alive()
    try:
        for arguments in (["train", "--resume", str(run)], configured(parts, run)):
            assert main(arguments) == 2
            error = capsys.readouterr().err
            assert f"'{run}' is being trained by process {process.pid}; wait for it" in error
        assert latest_checkpoint(run) is None
    finally:
        process.kill()
    assert child_runs.exit_code(process) == -signal.SIGKILL
    assert (run / LOCK).exists()
    with run_lock(run):
        assert (run / "run.pid").read_text() == f"{os.getpid()}\n"
    told = f"process {process.pid}, by which '{run}' was trained last, was killed from outside"
    assert told in caplog.text
    caplog.clear()
    with run_lock(run):  # and free again
        pass
    assert not caplog.text, "it ended by itself"


def test_a_run_can_be_locked_once_only(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(UserError, match=str(os.getpid())), run_lock(tmp_path):
        pass


def test_the_saved_config_says_how_many_checkpoints_stay(parts: Path, tmp_path: Path) -> None:
    save_config(config_of(parts, tmp_path), tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["checkpoint"] == {"every": 2, "keep": 3}
