"""Killed anywhere, a run resumes to the same bits, and loses no more than the iterations since its checkpoint."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import stat
import sys
import time
from pathlib import Path

import child_runs
import pytest
from checkpoint_damage import FILES
from small_runs import config_of, train, without_time
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiers import some_slow

from leapalign.cli import main
from leapalign.config import Config, save_config
from leapalign.runs.checkpoint import latest_checkpoint, step_folder
from leapalign.runs.run_folder import read_metrics

pytestmark = pytest.mark.posix
ITERATIONS = 3
# Point of `storage.faults` -> iterations between checkpoints -> which of the point's passes kill. An iteration passes 3
# velocities in its rollout (and samples as many), 1 reward gradient, 2 velocities in the surrogate, 1 step of the
# weights, 108 averages, 3 points of its metrics; a checkpoint has 5 files.
KILLS: dict[str, dict[int, tuple[int, ...]]] = {
    "rollout": {1: (1, 8), 2: (5, 13)},
    "reward": {1: (1,), 2: (3,)},
    "surrogate": {1: (1, 4), 2: (5,)},
    "optimizer": {1: (1, 2), 2: (1, 3)},
    "average": {1: (1, 216), 2: (100, 300)},
    "metrics": {1: (1, 5, 9), 2: (2, 3, 6)},
    "samples": {1: (1, 2), 2: (3,)},
    "checkpoint file": {1: (1, 2, 3, 4, 5, 8, 14), 2: (1, 10)},
    "sync": {1: (1, 3, 9, 20, 40), 2: (12, 30)},
    "rename": {1: (1, 2, 4, 7), 2: (5, 8)},
    "renamed": {1: (2, 6, 9), 2: (3, 7)},
    "delete": {1: (1, 2), 2: (1,)},
}


def config(parts: Path, run: Path, every: int) -> Config:
    assignments = (
        f"train.iterations={ITERATIONS}",
        f"checkpoint.every={every}",
        "checkpoint.keep=1",
        "optimizer.name=adamw_8bit",
        "model.dtype=bfloat16",
        "optimizer.schedule=cosine",
        "train.batch_size=2",
        "rollout.batch_size=2",
        "samples.count=1",
    )
    return config_of(parts, run, *assignments)


def contents(run: Path) -> dict[str, bytes]:
    """The last checkpoint and the samples."""
    found = [*(step_folder(run, ITERATIONS) / name for name in FILES), *(run / "samples").glob("*")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


def steps_in_tensorboard(run: Path) -> list[int]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("reward")]


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert child_runs.exit_code(child_runs.started(child_runs.train, config(parts, run, 1))) == 0
    return run


def assert_same(run: Path, whole: Path) -> None:
    assert contents(run) == contents(whole)
    assert without_time(read_metrics(run)) == without_time(read_metrics(whole))
    assert steps_in_tensorboard(run) == list(range(1, ITERATIONS + 1))
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("point", some_slow(KILLS, ("optimizer", "renamed")))
def test_killed_anywhere_the_run_is_the_same(parts: Path, whole: Path, tmp_path: Path, point: str) -> None:
    configs = {
        (every, count): config(parts, tmp_path / f"{every}-{count}", every)
        for every, counts in KILLS[point].items()
        for count in counts
    }
    # All at once: the processors are kept busy.
    killed = [
        child_runs.started(child_runs.train, asked, False, f"{point}:{count}") for (_, count), asked in configs.items()
    ]
    assert [child_runs.exit_code(process) for process in killed] == [-signal.SIGKILL] * len(killed)
    before = {}
    for case, asked in configs.items():
        run = Path(asked.output)
        checkpoint = latest_checkpoint(run)
        done = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
        records = read_metrics(run)
        assert 0 <= len(records) - done <= asked.checkpoint.every, case
        before[case] = records[:done]
    resumed = [child_runs.started(child_runs.train, asked, True) for asked in configs.values()]
    assert [child_runs.exit_code(process) for process in resumed] == [0] * len(resumed)
    for case, asked in configs.items():
        run = Path(asked.output)
        assert_same(run, whole)
        # To the second: what was done was not done again.
        assert read_metrics(run)[: len(before[case])] == before[case], case


def test_the_page_names_tests_that_exist_and_counts_the_kills() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 40
    assert named <= set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    kills = sum(len(counts) for cases in KILLS.values() for counts in cases.values())
    assert f"The kills are {kills}, at every point" in page


def test_there_are_kills_at_every_point() -> None:
    package = Path(__file__).parents[2] / "leapalign"
    named = {name for path in package.rglob("*.py") for name in re.findall(r'\bpoint\("([^"]+)"\)', path.read_text())}
    assert named == {*KILLS, "watch"}, "those of the watch are in test_resumed_watch.py"


def test_killed_again_and_again_the_run_is_the_same(parts: Path, whole: Path, tmp_path: Path) -> None:
    asked = config(parts, tmp_path / "run", 1)
    for number, fault in enumerate(("rename:4", "optimizer:1", "checkpoint file:5", "metrics:2", "delete:1")):
        process = child_runs.started(child_runs.train, asked, number > 0, fault)
        assert child_runs.exit_code(process) == -signal.SIGKILL
    assert child_runs.exit_code(child_runs.started(child_runs.train, asked, True)) == 0
    assert_same(tmp_path / "run", whole)


def test_killed_before_anything_was_written_the_run_can_begin_again(parts: Path, whole: Path, tmp_path: Path) -> None:
    asked = config(parts, tmp_path / "run", 1)
    # The first flush is that of the new folder's name, the second that of its config, not yet in place.
    process = child_runs.started(child_runs.train, asked, False, "sync:2")
    assert child_runs.exit_code(process) == -signal.SIGKILL
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert child_runs.exit_code(child_runs.started(child_runs.train, asked)) == 0
    assert_same(tmp_path / "run", whole)


def command(arguments: list[str], errors: Path, limit: int | None = None) -> None:
    """The command line without root's privileges, its errors in a file; ``limit``: bytes that a file may have."""
    child_runs.torch.set_num_threads(1)
    _drop_capabilities()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with errors.open("w") as sys.stderr:
        code = main(arguments)
    sys.exit(code)


def _drop_capabilities() -> None:
    """Root may write anywhere by capabilities alone, which Linux lets it give up."""
    if os.geteuid() == 0 and sys.platform == "linux":
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, data) == 0


def failed(arguments: list[str], errors: Path, limit: int | None = None) -> str:
    """The one sentence of a command that ends with 2."""
    assert child_runs.exit_code(child_runs.started(command, arguments, errors, limit)) == 2
    text = errors.read_text()
    assert "Traceback" not in text
    sentences = [line for line in text.splitlines() if line.startswith("leapalign: ")]
    assert len(sentences) == 1
    return sentences[0]


def test_a_real_write_error_in_a_checkpoint_leaves_the_one_before(parts: Path, whole: Path, tmp_path: Path) -> None:
    """The system refuses to let a file grow, as it does on a full disk."""
    run = tmp_path / "run"
    asked = config(parts, run, 1)
    process = child_runs.started(child_runs.train, asked, False, "rename:6")
    assert child_runs.exit_code(process) == -signal.SIGKILL
    before = latest_checkpoint(run)
    assert before is not None
    sentence = failed(["train", "--resume", str(run)], tmp_path / "errors.txt", limit=1_000_000)
    assert "cannot write" in sentence
    assert "too large" in sentence
    assert latest_checkpoint(run) == before
    assert not list(run.rglob("*.partial"))
    assert child_runs.exit_code(child_runs.started(child_runs.train, asked, True)) == 0
    assert_same(run, whole)


def test_a_folder_that_cannot_be_written_is_told_and_left_alone(parts: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = config(parts, run, 1)
    process = child_runs.started(child_runs.train, asked, False, "samples:2")
    assert child_runs.exit_code(process) == -signal.SIGKILL
    paths = [run, *run.rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        sentence = failed(["train", "--resume", str(run)], tmp_path / "errors.txt")
        assert f"cannot write '{run}" in sentence
        assert "(Permission denied)" in sentence
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert child_runs.exit_code(child_runs.started(child_runs.train, asked, True)) == 0
    assert_same(run, whole)


def test_a_new_run_in_a_folder_that_cannot_be_written_is_told(parts: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    save_config(config(parts, closed / "run", 1), tmp_path / "config.yaml")
    closed.chmod(0o500)
    sentence = failed(["train", "--config", str(tmp_path / "config.yaml")], tmp_path / "errors.txt")
    assert f"cannot write '{closed / 'run'}' (Permission denied)" in sentence


def test_clocks_that_go_backwards_change_nothing(
    parts: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(2_000_000_000, 0, -3600))
    for name in ("time", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: float(next(ticks)))
    train(config(parts, tmp_path / "run", 1))
    monkeypatch.undo()
    assert_same(tmp_path / "run", whole)
