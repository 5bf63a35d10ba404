"""What a resumed run needs of its watch, and that its records are the same."""

from __future__ import annotations

import signal
from pathlib import Path

import child_runs
import pytest
from checkpoint_damage import flip
from command_line import refused
from small_runs import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched_runs import other_reward, watched

from leapalign.cli import main
from leapalign.config import Config
from leapalign.runs.checkpoint import step_folder
from leapalign.runs.run_folder import MetricsLog
from leapalign.watch.base import FILE as BASE_FILE
from leapalign.watch.records import FILE, read_watch, replace_watch


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint_and_measures_it_again(
    parts: Path, run: Path, finished: Path
) -> None:
    for step in (4, 6):
        flip(step_folder(run, step) / "optimizer.safetensors")
    train(watched(parts, run, "train.iterations=6", "checkpoint.keep=9", other_reward(parts)), resume=True)
    assert (run / FILE).read_bytes() == (finished / FILE).read_bytes()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("watch/drift")] == [0, 2, 4, 6]


def test_records_beyond_the_checkpoint_are_dropped_even_when_nothing_is_watched_any_more(tmp_path: Path) -> None:
    replace_watch(tmp_path, [{"iteration": 0}, {"iteration": 2}, {"iteration": 4}])
    for iteration, left in ((2, [0, 2]), (0, [])):
        with MetricsLog(tmp_path, iteration):
            pass
        assert [record["iteration"] for record in read_watch(tmp_path)] == left


@pytest.mark.slow
@pytest.mark.posix
def test_killed_around_a_measurement_the_run_is_the_same(parts: Path, tmp_path: Path) -> None:
    """In one, and as the base and each record is written: config, history, metrics and samples are renamed before."""
    faults = ("watch:1", "watch:4", "renamed:5", "rename:6", "renamed:7")

    def config(name: str) -> Config:
        asked = ("train.iterations=2", "train.batch_size=2", "samples.count=1", "watch.every=1", "checkpoint.every=1")
        return watched(parts, tmp_path / name, *asked)

    # All at once: the processors are kept busy.
    first = {fault: child_runs.started(child_runs.train, config(fault), False, fault) for fault in faults}
    whole = child_runs.started(child_runs.train, config("whole"))
    assert [child_runs.exit_code(process) for process in first.values()] == [-signal.SIGKILL] * len(faults)
    again = [child_runs.started(child_runs.train, config(fault), True) for fault in faults]
    assert [child_runs.exit_code(process) for process in (whole, *again)] == [0] * (len(faults) + 1)
    expected = contents(tmp_path / "whole")
    assert [step for step, _ in expected[2]] == [0, 1, 2]
    for fault in faults:
        assert contents(tmp_path / fault) == expected, fault


def contents(run: Path) -> tuple[bytes, bytes, list[tuple[int, float]], list[str]]:
    """What a watched run leaves behind."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("watch/diversity")]
    files = sorted(path.name for path in (*run.glob("*.partial"), *(run / "checkpoints").iterdir()))
    return (run / FILE).read_bytes(), (run / BASE_FILE).read_bytes(), shown, files


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["watch.seeds=3"], "watch.seeds has changed since the base was measured"),
        (["rollout.num_steps=4"], "rollout.num_steps has changed"),
        (["model.guidance=1"], "model.guidance has changed"),
        (["watch.prompts=PROMPTS"], "watch.prompts has changed"),
        (["watch.rewards=[{name: clipscore, path: REWARD}, {name: clipscore, path: REWARD}]",
          "watch.stop_when=[held_out_clipscore_2 < 0]"], "did not measure held_out_clipscore_2 from its start"),
    ],
)  # fmt: skip
def test_other_held_out_images_are_refused(
    parts: Path, run: Path, capsys: pytest.CaptureFixture[str], assignments: list[str], message: str
) -> None:
    before = (run / FILE).read_bytes()
    for word, path in (("PROMPTS", parts / "prompts.txt"), ("REWARD", parts / "reward")):
        assignments = [item.replace(word, str(path)) for item in assignments]
    assert message in refused(["train", "--resume", str(run), *assignments], capsys)
    assert (run / FILE).read_bytes() == before


def test_a_base_that_is_lost_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / BASE_FILE).write_bytes(b"short")
    assert "which the watch compares with; put it back" in refused(["train", "--resume", str(run)], capsys)
    (run / BASE_FILE).unlink()
    assert "which the watch compares with; put it back" in refused(["train", "--resume", str(run)], capsys)
    (run / FILE).unlink()
    assert "was not watched from its start" in refused(["train", "--resume", str(run)], capsys)
    assert main(["train", "--resume", str(run), "watch.every=0"]) == 0
