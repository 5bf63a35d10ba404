"""Wherever tensors live, and whatever is recomputed, the run is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from places import BYTES, HOST, PLACES, STREAMED, stack
from small_runs import config_of, train, weights, without_time
from tiers import some_slow

from leapalign.inputs.validation import UserError
from leapalign.memory.host_weights import HostWeights
from leapalign.runs.run_folder import read_metrics


@pytest.fixture(scope="module")
def plain(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Five iterations with everything on the device."""
    return run(parts, tmp_path_factory.mktemp("plain"))


def run(parts: Path, output: Path, *assignments: str) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    config = config_of(parts, output, BYTES, "train.iterations=5", "samples.every=5", *assignments)
    return weights(train(config)), without_time(read_metrics(output))


@pytest.mark.parametrize("place", some_slow(PLACES, ("streamed, a sample at a time", "rewards on the host")))
def test_every_place_gives_the_same_run(parts: Path, plain: Any, tmp_path: Path, place: str) -> None:
    found, records = run(parts, tmp_path, *PLACES[place])
    if "train.microbatch=1" in PLACES[place]:
        # Other sums, and an optimizer that magnifies what is nearly zero.
        for record, expected in zip(records, plain[1], strict=True):
            assert record["reward"] == pytest.approx(expected["reward"], rel=2e-3)
    else:
        assert torch.equal(found, plain[0])
        assert records == plain[1]
    for picture in sorted((tmp_path / "samples").glob("*.png")):
        assert picture.stat().st_size > 0


@pytest.mark.parametrize("place", some_slow(["host optimizer", "streamed"], ["streamed"]))
def test_factored_moments_give_the_same_run_in_either_memory(parts: Path, tmp_path: Path, place: str) -> None:
    asked = ("optimizer.name=adafactor", "train.iterations=3")
    whole, records = run(parts, tmp_path / "device", *asked)
    found, others = run(parts, tmp_path / "host", *asked, *PLACES[place])
    assert torch.equal(found, whole)
    assert others == records


def test_resuming_with_weights_in_host_memory(parts: Path, tmp_path: Path) -> None:
    asked = (BYTES, *STREAMED, "train.iterations=4")
    whole = train(config_of(parts, tmp_path / "whole", *asked))
    train(config_of(parts, tmp_path / "cut", *asked, "train.iterations=2"))
    resumed = train(config_of(parts, tmp_path / "cut", *asked), resume=True)
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ((HOST,), "adamw_8bit"),
        ((BYTES, "memory.weights=streamed"), "memory.optimizer host"),
        ((BYTES, HOST, "memory.weights=streamed"), "memory.checkpointing to blocks"),
        ((BYTES, *STREAMED, "memory.checkpoint_every=2"), "checkpoint_every to 1"),
        ((BYTES, HOST, "diagnostics.true_gradient_every=2"), "true_gradient_every"),
        ((BYTES, *STREAMED, "memory.stream_buffers=1"), "stream_buffers"),
    ],
)
def test_places_that_exclude_each_other_are_refused(
    parts: Path, tmp_path: Path, assignments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_of(parts, tmp_path, *assignments)


def test_a_ring_holds_the_blocks_in_use_and_the_next() -> None:
    model = stack()
    held = HostWeights(model, torch.device("cpu"), buffers=2)
    for number in (0, 1, 2):
        model.blocks[number](torch.zeros(1, 3))
        loaded = [n for n, group in enumerate(held._blocks) if group.buffer is not None]
        assert loaded == [number, number + 1]
        pointer = model.blocks[number].weight.data_ptr()
        assert pointer in {buffer.memory.data_ptr() for buffer in held._ring}
    with held.changing():
        assert all(group.buffer is None for group in held._blocks)
        with torch.no_grad():
            model.blocks[4].weight.fill_(7.0)
            model.head.weight.fill_(9.0)
    assert float(model.head.weight.detach().mean()) == 9.0
    assert float(model.blocks[4](torch.ones(1, 3)).detach().mean()) == pytest.approx(
        21 + float(model.blocks[4].bias.detach().mean()), rel=1e-5
    )


def test_weights_that_cannot_move_together_are_refused() -> None:
    mixed = stack()
    mixed.head.double()
    with pytest.raises(UserError, match="several dtypes"):
        HostWeights(mixed, torch.device("cpu"), None)
    shared = stack()
    shared.blocks[1].weight = shared.blocks[0].weight
    with pytest.raises(UserError, match="share weights"):
        HostWeights(shared, torch.device("cpu"), None)
