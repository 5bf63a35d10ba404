"""Several processes as a user starts them: by torchrun, or by ``leapalign train --processes``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_distance import same_bits
from parallel_runs import config
from process_groups import written

from leapalign.cli import main
from leapalign.runs.checkpoint import checkpoints_of
from leapalign.runs.run_folder import read_metrics

pytestmark = pytest.mark.posix
BY_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "leapalign.cli", "train"]
BY_ITSELF = [sys.executable, "-m", "leapalign.cli", "train", "--processes", "2"]


def ran(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("words", [BY_TORCHRUN, BY_ITSELF], ids=["torchrun", "processes"])
def test_either_way_it_is_the_same_run(words: list[str], two: Path, parts: Path, tmp_path: Path) -> None:
    asked = config(parts, tmp_path / "run")
    done = ran([*words, "--config", written(asked, tmp_path), "--json"])
    assert done.returncode == 0, done.stderr
    assert same_bits(tmp_path / "run", two, 4)
    assert done.stdout.count('"iteration": 4') == 1
    assert done.stderr.count("iteration 4 of 4") == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", [BY_TORCHRUN, BY_ITSELF], ids=["torchrun", "processes"])
def test_bad_input_is_one_sentence(words: list[str], parts: Path, tmp_path: Path) -> None:
    done = ran([*words, "--config", written(config(parts, tmp_path / "run"), tmp_path), "optimizer.name=adafactor"])
    assert done.returncode in ((2,) if words is BY_ITSELF else (1, 2))
    assert done.stderr.count("leapalign: ") == 1
    assert "optimizer.name adafactor works with one process only" in done.stderr


@contextlib.contextmanager
def training(parts: Path, place: Path) -> Iterator[subprocess.Popen[str]]:
    """A long run of two processes that has begun, in ``place / "run"``."""
    asked = config(parts, place / "run", "train.iterations=400", "checkpoint.every=400", "samples.every=0")
    metrics = place / "run" / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*BY_ITSELF, "--config", written(asked, place)]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.1)
        yield process


@pytest.mark.slow
def test_asked_to_stop_it_has_all_stop_in_good_order(parts: Path, tmp_path: Path) -> None:
    with training(parts, tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        heard = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM, heard
    done = len(read_metrics(tmp_path / "run"))
    assert list(checkpoints_of(tmp_path / "run")) == [done] != [400]
    assert heard.count(f"stopped after iteration {done}; continue with") == 1
    assert "Traceback" not in heard


@pytest.mark.slow
def test_a_killed_process_ends_all_with_a_sentence_within_30_seconds(parts: Path, tmp_path: Path) -> None:
    with training(parts, tmp_path) as process:
        os.kill(int((tmp_path / "run" / "run.pid").read_text()), signal.SIGKILL)
        killed = time.monotonic()
        heard = process.communicate()[1]
    assert process.returncode == 2, heard
    assert time.monotonic() - killed < 30
    assert "process 0 of 2 was ended by SIGKILL" in heard
    assert read_metrics(tmp_path / "run")


@pytest.mark.parametrize("number", ["0", "-2"])
def test_a_number_of_processes_that_is_none(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "tiny", "--processes", number]) == 2
    assert "--processes must be at least 1" in capsys.readouterr().err


def test_processes_within_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--config", "tiny", "--processes", "2"]) == 2
    assert "torchrun has started the processes already; leave out --processes" in capsys.readouterr().err
