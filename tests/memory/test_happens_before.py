"""Every two accesses to the same memory, of which one writes, are ordered; and the checker sees where they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from happens_before import Done, VectorClock, World, drop, watched
from leap_kernels import ema_update_, stochastic_round_
from places import BYTES, HOST, STREAMED, stack
from small_runs import config_of
from tiers import some_slow
from torch import nn

from leapalign.config import EmaConfig, load_config
from leapalign.config.profiles import RECIPES, profiles
from leapalign.memory import transfer
from leapalign.memory.host_gradients import HostGradients
from leapalign.memory.host_weights import HostWeights
from leapalign.memory.transfer import Lane, ToHost
from leapalign.optimizers.weight_average import WeightAverage
from leapalign.runs.run import Run

CPU = torch.device("cpu")


def _places() -> dict[str, tuple[str, ...]]:
    """What the profiles choose among that moves memory or changes who reads it, each choice once, and more."""
    found: dict[str, tuple[str, ...]] = {}
    for name, file in profiles().items():
        if RECIPES in file.parents:
            continue
        config = load_config(file)
        chosen = {f"memory.{key}": getattr(config.memory, key) for key in MEMORY}
        chosen |= {"optimizer.name": config.optimizer.name, "ema.dtype": config.ema.dtype}
        chosen |= {"model.dtype": config.model.dtype}
        place = tuple(f"{key}={str(value).lower()}" for key, value in chosen.items())
        if place not in found.values():
            found[name] = place
    more = {
        "streamed through two buffers": (*STREAMED, "memory.stream_buffers=2", BYTES),
        "adapters near a streamed base": (*STREAMED[:2], *ADAPTER, "regularization.base_velocity=20"),
        "near the base on the host": (HOST, BYTES, "regularization.base_velocity=20"),
        "near the base on the device": (BYTES, "regularization.base_velocity=20"),
        "adapters over streamed weights": ("memory.weights=streamed", "memory.checkpointing=blocks", *ADAPTER),
    }
    return found | more


MEMORY = ("optimizer", "weights", "stream_buffers", "checkpointing", "checkpoint_every", "checkpoint_decoder")
ADAPTER = ("model.lora_rank=2", BYTES)
PLACES = _places()


@pytest.mark.parametrize("place", some_slow(PLACES, ("flux1_dev/16gb", "near the base on the host", "flux1_dev/80gb")))
def test_a_run_has_no_races(parts: Path, tmp_path: Path, place: str) -> None:
    """Of training, samples by the average and checkpoints."""
    short = ("rollout.num_steps=2", "train.iterations=2", "checkpoint.every=1", "samples.every=1", "samples.count=1")
    config = config_of(parts, tmp_path / "run", *short, *PLACES[place])
    with watched() as world:
        run = Run.from_config(config)
        if config.memory.optimizer == "device":
            parameters = [p for p in run.trainer.model.transformer.parameters() if p.requires_grad]
            # On a GPU the average takes the device's weights over so.
            run.trainer.optimizer.average._to_host = ToHost(CPU, parameters)
        run.train()
    assert not world.races, world.races
    assert all(world.accesses[name] for name in ("host thread", "own stream", "lane", "background")), world.accesses
    assert config.optimizer.name != "adamw_8bit" or world.written["adamw_8bit_step_many_"]


def scenario(world: World) -> None:
    """More blocks than buffers, and more gradients than buffers; weights change after a load that nobody needed."""
    model = stack(5)
    weights = HostWeights(model, CPU, 2)
    parameters = list(model.parameters())
    gradients = HostGradients(parameters, CPU)
    for _ in range(2):
        x = torch.ones(1, 3)
        with torch.no_grad():
            for block in model.blocks:
                x = block(x)
            model.head(x)
        for parameter in parameters:
            gradients.add(parameter, torch.ones(parameter.shape))
        gradients.wait()
        with weights.changing(), torch.no_grad():
            for parameter in parameters:
                parameter.add_(gradients[parameter])
    model = stack(3)
    weights = HostWeights(model, CPU, None)
    for _ in range(2):
        with torch.no_grad():
            for block in model.blocks:
                block(torch.ones(1, 3))
            with weights.changing():
                for parameter in model.parameters():
                    parameter.add_(1)
    on_device = [nn.Parameter(torch.ones(n)) for n in (3, 9, 5, 7)]
    average = WeightAverage(on_device, EmaConfig(), seed=1)
    average._to_host = ToHost(CPU, on_device)
    for _ in range(3):
        with torch.no_grad():
            for parameter in on_device:
                parameter.add_(0.1)
        average.update()


def test_the_direct_scenario_has_no_races() -> None:
    with watched() as world:
        scenario(world)
    assert not world.races, world.races


class _Never:
    clock = VectorClock()

    def synchronize(self) -> None:
        pass


MUTATIONS: dict[str, tuple[type, str, str, Callable[[], Any]]] = {
    "a block's copy is not needed": (Lane, "need", "load", lambda: None),
    "a refreshed copy is not needed": (Lane, "need", "_refresh", lambda: None),
    "a block's last use is not marked": (Lane, "mark", "load", _Never),
    "the use before a refresh is not marked": (Lane, "mark", "_refresh", _Never),
    "copies are not finished before a change": (Lane, "finish", "changing", lambda: None),
    "what makes a tensor is not marked": (Lane, "mark", "send", _Never),
    "a full buffer is not waited for": (Done, "result", "send", lambda: None),
    "gradients are not waited for": (ToHost, "wait", "wait", lambda: None),
    "the average is not waited for": (ToHost, "wait", "update", lambda: None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_not_ordered_is_reported(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    drop(monkeypatch, *MUTATIONS[mutation])
    with watched() as world:
        scenario(world)
    assert world.races


def test_a_read_before_arrival_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = transfer._use
    monkeypatch.setattr(transfer, "_use", lambda arrived, *rest: real(_Never(), *rest))
    with watched() as world:
        scenario(world)
    assert world.races


def test_a_source_that_is_freed_too_early_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = transfer._use

    def holding_nothing(arrived: Any, source: Any, *rest: Any) -> None:
        real(arrived, source[0], *rest)

    monkeypatch.setattr(transfer, "_use", holding_nothing)
    with watched() as world:
        background = transfer.Background
        held = background.run
        background.run = lambda self, f, arrived, source, *rest: held(self, f, arrived, [source], *rest)
        gradients = HostGradients([nn.Parameter(torch.ones(5))], CPU)
        gradients.add(next(iter(gradients._sums)), torch.ones(5))
    assert any("freed" in race for race in world.races), world.races


def test_kernels_that_write_are_seen() -> None:
    with watched() as world:
        average, weights = torch.zeros(64), torch.ones(64)
        ema_update_(average, weights, 0.5)
        stochastic_round_(torch.zeros(64, dtype=torch.bfloat16), average, 1, 0)
    assert world.written["ema_update_"] == 1
    assert world.written["stochastic_round_"] == 1
