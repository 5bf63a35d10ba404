"""Every profile fits the card that it is named after, by the recorded simulations; one of them is run again."""

from __future__ import annotations

import pytest

from benchmarks.families import card_of, fingerprint, measured, profiles, recorded
from leapalign.config import load_config
from leapalign.planning.allowance import allowance
from leapalign.planning.auto import for_tensors


@pytest.mark.parametrize("profile", profiles())
def test_a_profile_fits_its_card(profile: str) -> None:
    line = recorded().get(profile)
    assert line is not None, "run python benchmarks/families.py"
    assert line["settings"] == fingerprint(load_config(profiles()[profile])), "run python benchmarks/families.py"
    card = card_of(profile) * 2**30
    assert line["device_peak_bytes"] <= for_tensors(card)
    assert line["device_reserved_bytes"] + allowance(card) <= card


def test_the_record_holds_nothing_else() -> None:
    assert recorded().keys() == profiles().keys()


@pytest.mark.parametrize("setting", ["train.microbatch=1", "model.height=1024", "memory.stream_buffers=2"])
def test_a_setting_that_matters_shows_in_the_fingerprint(setting: str) -> None:
    path = profiles()["z_image/16gb"]
    assert fingerprint(load_config(path, (setting,))) != fingerprint(load_config(path))
    assert fingerprint(load_config(path, ("output=elsewhere", "prompts.cache=null"))) == fingerprint(load_config(path))


@pytest.mark.slow
def test_a_simulation_finds_what_is_on_record() -> None:
    """Of the smallest model; that it is the real iteration's need, tests/planning/test_simulation.py holds."""
    profile = "stable_diffusion_3_5_medium/48gb"
    assert measured(profile) == recorded()[profile]
