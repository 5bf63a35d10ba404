"""Every profile of FLUX.1-dev, on the tiny FLUX through the command line, trains the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import without_time
from tiers import some_slow

from leapalign import cli
from leapalign.runs.run_folder import read_metrics

PROFILES = sorted((Path(__file__).parents[2] / "configs" / "flux1_dev").glob("*.yaml"), key=lambda path: path.stem)
CASES = some_slow(PROFILES, [path for path in PROFILES if path.stem in ("80gb", "16gb")])
TOGETHER = ("rollout.batch_size=4", "train.microbatch=4", "train.reward_chunk=4")
ONE_BY_ONE = ("rollout.batch_size=1", "train.microbatch=1", "train.reward_chunk=1")


def run(profile: Path, parts: Path, output: Path, *assignments: str) -> list[dict[str, Any]]:
    """The metrics of four iterations of four images each."""
    settings = (
        f"output={output}",
        f"model.path={parts / 'model'}",
        "model.height=32",
        "model.width=32",
        f"reward={{name: pickscore, path: {parts / 'reward'}}}",
        f"prompts.path={parts / 'prompts.txt'}",
        "prompts.cache=null",
        "watch={}",
        "threshold=1.0",
        "rollout.num_steps=3",
        "train.batch_size=4",
        "train.iterations=4",
        "checkpoint.every=2",
        "samples.count=1",
    )
    assert cli.main(["train", "--config", str(profile), *settings, *assignments]) == 0
    return without_time(read_metrics(output))


@pytest.fixture(scope="module")
def plain(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Everything on the device, nothing recomputed, four images at once: the run in either dtype."""
    plain = ("memory={}", *TOGETHER)
    return {
        dtype: run(PROFILES[0], parts, tmp_path_factory.mktemp(dtype), f"model.dtype={dtype}", *plain)
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize("profile", CASES, ids=lambda path: path.stem)
def test_profiles_differ_in_places_only(profile: Path, parts: Path, plain: Any, tmp_path: Path) -> None:
    assert run(profile, parts, tmp_path / "float32", "model.dtype=float32", *TOGETHER) == plain["float32"]
    # Bfloat16 gradients add up in bfloat16 on the device, in float32 on the host.
    for record, expected in zip(run(profile, parts, tmp_path, *TOGETHER), plain["bfloat16"], strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=2**-8)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2**-6)


@pytest.mark.parametrize("profile", CASES, ids=lambda path: path.stem)
def test_resumed_runs_are_the_same_to_the_bit(profile: Path, parts: Path, tmp_path: Path) -> None:
    """The checkpoint's manifest holds the SHA-256 of weights, average and optimizer states."""
    metrics = run(profile, parts, tmp_path, *TOGETHER)
    last = tmp_path / "checkpoints" / "step-4"
    manifest = json.loads((last / "manifest.json").read_text())
    shutil.rmtree(last)
    assert cli.main(["train", "--resume", str(tmp_path)]) == 0
    assert without_time(read_metrics(tmp_path)) == metrics
    assert json.loads((last / "manifest.json").read_text()) == manifest
    assert {Path(name).suffix for name in manifest["files"]} > {".safetensors"}


@pytest.mark.parametrize("profile", CASES, ids=lambda path: path.stem)
def test_four_images_one_by_one_are_four_at_once(profile: Path, parts: Path, plain: Any, tmp_path: Path) -> None:
    found = run(profile, parts, tmp_path, "model.dtype=float32", *ONE_BY_ONE)
    for record, expected in zip(found, plain["float32"], strict=True):
        # Sums of other lengths; later iterations also start from weights that an 8-bit moment moved the other way.
        close = 1e-5 if record["iteration"] == 1 else 1e-3
        assert record["loss"] == pytest.approx(expected["loss"], rel=close)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * close)
