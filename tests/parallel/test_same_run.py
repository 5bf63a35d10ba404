"""Two processes make the run that one makes: weights, average, moments and metrics."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import process_groups
import pytest
from checkpoint_distance import KINDS, distance, same_bits
from parallel_runs import config
from watched_runs import watched

from leapalign.runs.run_folder import read_metrics
from leapalign.watch.records import read_watch

pytestmark = pytest.mark.posix
BOUND = 1e-6
"""Relative: products of four images and of two are added up in another order, and Adam divides by their size."""


def close(metrics: list[dict[str, float]], exact: list[dict[str, float]], bound: float) -> None:
    assert len(metrics) == len(exact)
    for found, expected in zip(metrics, exact, strict=True):
        assert found.keys() == expected.keys()
        for name in found.keys() - {"seconds", "moved"}:
            size = max(abs(expected[name]), 1e-2)
            assert math.isclose(found[name], expected[name], abs_tol=bound * size), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_checkpoint_of_one(one: Path, two: Path, kind: str) -> None:
    assert 0 < distance(two, one, 4, kind) <= BOUND


def test_their_metrics_are_those_of_all_images(one: Path, two: Path) -> None:
    close(read_metrics(two), read_metrics(one), 1e-4)


def test_they_leave_the_same_files(one: Path, two: Path) -> None:
    """But for the name of TensorBoard's, which has the time."""
    found = [{path.relative_to(run) for path in run.rglob("*") if "tfevents" not in path.name} for run in (one, two)]
    assert found[0] == found[1]
    config_files = [run / "checkpoints" / "step-4" / "transformer" / "config.json" for run in (one, two)]
    assert config_files[0].read_text() == config_files[1].read_text()


@pytest.mark.slow
def test_a_second_time_they_make_the_same_bits(two: Path, parts: Path, tmp_path: Path) -> None:
    again = process_groups.trained(config(parts, tmp_path / "run"), 2, tmp_path)
    assert same_bits(again, two, 4)


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_goes_on_with_as_many_processes_as_there_are(
    one: Path, two: Path, count: int, parts: Path, tmp_path: Path
) -> None:
    """From a checkpoint of two; two of them to the bits that they would have made anyway."""
    run = tmp_path / "run"
    shutil.copytree(two, run)
    shutil.rmtree(run / "checkpoints" / "step-4")
    process_groups.trained(config(parts, run), count, tmp_path, resume=True)
    assert same_bits(run, two, 4) == (count == 2)
    assert max(distance(run, one, 4, kind) for kind in KINDS) <= BOUND


CASES = {
    "gradients divided, weights whole": ("memory.shard=gradients", "train.batch_size=8"),
    "several rollouts": ("train.batch_size=8",),
    "microbatch": ("train.microbatch=1", "train.leaps_per_rollout=2", "train.reward_chunk=1"),
    "blocks recomputed": ("memory.checkpointing=blocks",),
    "attention kept": ("memory.checkpointing=attention", "memory.checkpoint_every=2"),
    "adapters": ("model.lora_rank=16",),
    "small adapters": ("model.lora_rank=2",),
    "guidance": ("model.true_cfg_scale=2", "model.true_cfg_batched=false"),
    "detached guidance": ("model.true_cfg_scale=2", "model.cfg_gradient=detached"),
    "patched": ("kernels.patch=true",),
    "rewards in host memory": ("memory.rewards=host",),
    "refl": ("method={name: refl}",),
    "draft_k": ("method={name: draft_k, steps: 2}",),
    "draft_lv": ("method={name: draft_lv}",),
    "drtune": ("method={name: drtune}", "rollout.num_steps=5"),
    "flowbp_sparse": ("method={name: flowbp_sparse}", "rollout.num_steps=5"),
    "flowbp_bridge": ("method={name: flowbp_bridge}", "rollout.num_steps=6"),
    "flowbp_lagrange": ("method={name: flowbp_lagrange}", "rollout.num_steps=6"),
    "average in bfloat16": ("ema.dtype=bfloat16",),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_so_it_is_with_other_settings(case: str, parts: Path, tmp_path: Path) -> None:
    runs = [
        process_groups.trained(config(parts, tmp_path / f"run-{count}", *CASES[case]), count, tmp_path / str(count))
        for count in (1, 2)
    ]
    kinds = [kind for kind in KINDS if kind != "transformer_ema" or case != "average in bfloat16"]
    assert max(distance(runs[1], runs[0], 4, kind) for kind in kinds) <= BOUND * (10 if "adapters" in case else 1)
    close(read_metrics(runs[1]), read_metrics(runs[0]), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["full", "gradients"])
def test_four_processes_make_it_too_and_leave_it_to_two(one: Path, shard: str, parts: Path, tmp_path: Path) -> None:
    run = process_groups.trained(config(parts, tmp_path / "run", f"memory.shard={shard}"), 4, tmp_path)
    assert max(distance(run, one, 4, kind) for kind in KINDS) <= BOUND
    shutil.rmtree(run / "checkpoints" / "step-4")
    process_groups.trained(config(parts, run), 2, tmp_path / "again", resume=True)
    assert max(distance(run, one, 4, kind) for kind in KINDS) <= BOUND


@pytest.mark.slow
def test_what_the_watch_sees_and_ends_is_the_same(parts: Path, tmp_path: Path) -> None:
    """The rule holds after two iterations, and both end."""
    rule = "watch.stop_when=[drift > 0]"
    runs = []
    for count in (1, 2):
        settings = watched(parts, tmp_path / f"run-{count}", rule, "optimizer.learning_rate=1e-4")
        runs.append(process_groups.trained(settings, count, tmp_path / str(count)))
    assert [len(read_metrics(run)) for run in runs] == [2, 2]
    close(read_watch(runs[1]), read_watch(runs[0]), 1e-4)
    assert "stopped after iteration 2, as" in process_groups.said(tmp_path / "2")


@pytest.mark.slow
def test_eight_bit_moments_and_bfloat16_weights_stay_near(parts: Path, tmp_path: Path) -> None:
    """Gradients are rounded to bfloat16 after each velocity, in whichever process: of few weights the next one."""
    asked = ("optimizer.name=adamw_8bit", "model.dtype=bfloat16")
    runs = {}
    for name, count, more in (("one", 1, ()), ("halves", 1, ("rollout.batch_size=2",)), ("two", 2, ())):
        settings = config(parts, tmp_path / name, *asked, *more)
        runs[name] = process_groups.trained(settings, count, tmp_path / f"{name}-place")
    apart = {name: distance(runs[name], runs["one"], 4, "transformer") for name in ("halves", "two")}
    # One process that makes its rollout in two halves is as far away.
    assert 0 < apart["two"] <= 1.5 * apart["halves"]
