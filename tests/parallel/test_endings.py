"""However a run of two processes ends, it ends for both, somebody says why, and it goes on to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import process_groups
import pytest
from checkpoint_distance import distance, same_bits
from parallel_runs import config
from process_groups import begun, said, written
from small_runs import PROMPTS
from tiers import some_slow

from leapalign.runs.checkpoint import checkpoints_of, latest_checkpoint
from leapalign.runs.run_folder import read_metrics
from leapalign.storage.json_lines import read_records

pytestmark = pytest.mark.posix
KILLED = -int(signal.SIGKILL)
# Which of the two -> where it dies. The first writes; an iteration passes 3 velocities in its rollout.
KILLS = [
    (0, "rollout:8"),
    (1, "rollout:8"),
    (0, "surrogate:4"),
    (1, "surrogate:7"),
    (1, "reward:2"),
    (0, "average:50"),
    (1, "average:230"),
    (0, "metrics:5"),
    (0, "samples:2"),
    (0, "checkpoint file:1"),
    (0, "checkpoint file:7"),
    (0, "rename:6"),
]


@pytest.mark.parametrize(("rank", "fault"), some_slow(KILLS, [(0, "checkpoint file:7")]))
def test_killed_anywhere_both_end_and_the_run_is_the_same(
    rank: int, fault: str, two: Path, parts: Path, tmp_path: Path
) -> None:
    settings = config(parts, tmp_path / "run")
    codes = begun(["train", "--config", written(settings, tmp_path)], 2, tmp_path, {rank: fault}).exit_codes()
    assert codes[rank] == KILLED
    assert codes[1 - rank] == 2
    assert said(tmp_path).count("leapalign: another of the 2 processes was killed") == 1
    assert "Traceback" not in said(tmp_path)
    # Only what is whole has its name.
    assert latest_checkpoint(tmp_path / "run") == max(checkpoints_of(tmp_path / "run").items(), default=(0, None))[1]
    process_groups.trained(settings, 2, tmp_path / "again", resume=True)
    assert same_bits(tmp_path / "run", two, 4)
    assert [record["iteration"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_asked_to_stop_one_of_them_stops_both_in_good_order(rank: int, two: Path, parts: Path, tmp_path: Path) -> None:
    settings = config(parts, tmp_path / "run", "train.iterations=400", "checkpoint.every=400", "samples.every=0")
    group = begun(["train", "--config", written(settings, tmp_path)], 2, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and len(group.running) == 2:
        time.sleep(0.05)
    os.kill(group.processes[rank].pid, signal.SIGTERM)
    assert group.exit_codes() == [0, 0], said(tmp_path)
    done = len(read_metrics(tmp_path / "run"))
    assert list(checkpoints_of(tmp_path / "run")) == [done] != [400]
    assert said(tmp_path).count(f"stopped after iteration {done}; continue with") == 1


OWN_REWARD = """
import math, os, torch
def reward(images, prompts):
    scores = images.mean(dim=(1, 2, 3))
    rank = int(os.environ.get("RANK", "0"))
    {what}
    return scores
"""


def with_reward(parts: Path, place: Path, run: Path, what: str, *assignments: str) -> object:
    place.mkdir(exist_ok=True)
    (place / "own.py").write_text(OWN_REWARD.format(what=what))
    return config(parts, run, f"reward={{name: custom, function: '{place / 'own.py'}:reward'}}", *assignments)


def test_an_error_in_one_of_them_is_said_once_and_ends_both(parts: Path, tmp_path: Path) -> None:
    what = "assert rank == 0, 'no images today'"
    settings = with_reward(parts, tmp_path, tmp_path / "run", what)
    codes = begun(["train", "--config", written(settings, tmp_path)], 2, tmp_path).exit_codes()
    assert codes == [1, 2]
    assert said(tmp_path).count("leapalign: ") == 1
    assert "no images today" in said(tmp_path)


def test_an_error_in_all_of_them_is_said_once(parts: Path, tmp_path: Path) -> None:
    settings = config(parts, tmp_path / "run", "rollout.batch_size=1", "train.batch_size=1")
    codes = begun(["train", "--config", written(settings, tmp_path)], 2, tmp_path).exit_codes()
    assert sorted(codes) == [1, 2]
    assert said(tmp_path).count("cannot be divided among 2 processes evenly; set rollout.batch_size to a multiple") == 1
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_refused(two: Path, parts: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "run")
    settings = config(parts, tmp_path / "run")
    assert sorted(begun(["train", "--config", written(settings, tmp_path)], 2, tmp_path).exit_codes()) == [1, 2]
    assert said(tmp_path).count("already holds a run") == 1


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [PROMPTS[0], None])
def test_a_sample_that_is_not_finite_takes_no_part(prompt: str | None, parts: Path, tmp_path: Path) -> None:
    """In whichever process it is; where ``prompt`` is None, all of the second process's."""
    # Of two processes the second has the last two of four images.
    last = "number >= (2 if 'RANK' not in os.environ else 2 - 2 * rank)"
    bad = f"prompt == {prompt!r}" if prompt else last
    what = f"scores = scores + torch.tensor([math.nan if {bad} else 0.0 for number, prompt in enumerate(prompts)])"
    runs = []
    for count in (1, 2):
        place = tmp_path / str(count)
        settings = with_reward(parts, place, tmp_path / f"run-{count}", what, "train.iterations=2", "threshold=10")
        runs.append(process_groups.trained(settings, count, place))
    one, two = runs
    assert distance(two, one, 2, "transformer") <= 1e-6
    skipped = [[record["skipped_samples"] for record in read_metrics(run)] for run in runs]
    assert skipped[0] == skipped[1]
    assert sum(skipped[0]) > 0
    incidents = [read_records(run / "incidents.jsonl") for run in runs]
    assert incidents[0] == incidents[1]
