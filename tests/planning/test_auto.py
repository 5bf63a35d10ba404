"""The search for settings that fit, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import BYTES
from small_runs import config_of

from leapalign import cli
from leapalign.config import Config, override, save_config
from leapalign.inputs.validation import UserError, validated
from leapalign.planning import auto
from leapalign.planning.allowance import CONTEXT, DRIVER, WORKSPACES
from leapalign.planning.auto import FILLED, fastest, for_tensors
from leapalign.planning.simulate import Simulation, simulate


@pytest.fixture(autouse=True, scope="module")
def simulated_once() -> Iterator[None]:
    """Whoever asks for the simulation of a configuration, it runs once."""
    found: dict[Any, Simulation] = {}

    until: Any = functools.cache(auto._until)

    def once(config: Config, iterate: Any = None) -> Simulation:
        iterate = iterate or until(None)
        key = repr(config), iterate
        return found[key] if key in found else found.setdefault(key, simulate(config, iterate))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "simulate", once)
        patch.setattr(auto, "_until", until)
        yield


def asked(parts: Path) -> Config:
    return config_of(parts, parts / "run", BYTES, "rollout.num_steps=2", "rollout.batch_size=1", "train.microbatch=1")


@pytest.mark.slow
def test_plenty_of_memory_buys_the_fastest_of_everything(parts: Path) -> None:
    settings, config, found = fastest(asked(parts), 2**40)
    assert (config.memory.optimizer, config.memory.weights, config.memory.checkpointing) == (
        "device",
        "resident",
        "none",
    )
    assert (config.rollout.batch_size, config.train.microbatch, config.train.reward_chunk) == (4, 4, None)
    assert found == simulate(config), "nothing is left from other candidates"
    assert "memory.optimizer=device" in settings


@pytest.mark.slow
def test_less_memory_makes_it_slower_step_by_step(parts: Path) -> None:
    """Every result fits, and a micro-batch twice as large would not."""
    config = asked(parts)
    most = fastest(config, 2**40)[2].device_peak
    least = auto.simulate(applied(config, *auto.PLACES[-1], *auto.SMALLEST)).device_peak
    places = []
    for share in (0.9, 0.1):
        room = least + share * (most - least)
        card = round((room / FILLED + CONTEXT + WORKSPACES) / (1 - DRIVER))
        assert for_tensors(card) == pytest.approx(room, abs=10)
        settings, chosen, found = fastest(config, card)
        assert found.device_peak <= room
        places.append(settings[:2])
        size = 2 * (chosen.train.microbatch or 0)
        if size <= chosen.rollout.batch_size:
            larger = auto.simulate(applied(config, *settings, f"train.microbatch={size}"))
            assert larger.device["surrogate"].total > room
    assert places == sorted(places, key=auto.PLACES.index)
    assert len(set(places)) > 1
    with pytest.raises(UserError, match=r"nothing fits: tensors may take 0.* GiB.*reduce the size of the images"):
        fastest(config, least // 2)


def applied(config: Config, *settings: str) -> Config:
    return validated(Config, override(dataclasses.asdict(config), settings), "test")


@pytest.mark.slow
def test_the_command_prints_settings_that_can_be_pasted(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    save_config(asked(parts), path)
    assert cli.main(["memory", "--config", str(path), "--auto", "--gpu-memory", "2GiB", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert found["fits"]
    assert " ".join(found["settings"]) in printed.out
    assert "GiB with memory.optimizer=device" in printed.err
    assert cli.main(["memory", "--config", str(path), "--json", *found["settings"]]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["device_peak_bytes"] == found["device_peak_bytes"]
