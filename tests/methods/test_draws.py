"""Where methods draw their steps: ranges, spacing, probabilities, and seeds."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.inputs.validation import UserError
from leapalign.methods import METHODS, get_method

STEPS, COUNT = 25, 4000


def draw(name: str, steps: int = STEPS, count: int = COUNT, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    return get_method(name, **options).draw(steps, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", METHODS)
def test_seed_decides_everything(name: str) -> None:
    first, again, other = (draw(name, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert name == "draft_k" or any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [2, 3, 5, 25])
def test_plans_hold_for_few_steps_too(name: str, steps: int) -> None:
    sigmas = torch.linspace(1, 0, steps + 1)
    plan = get_method(name).plan(sigmas, **draw(name, steps=steps, count=100))
    assert int(plan.index.max()) < steps
    # Every leap and step goes towards the image; single weights of an interpolation need not.
    assert name == "flowbp_lagrange" or bool((plan.coefficient <= 0).all())
    assert bool((plan.coefficient.sum(dim=0) < 0).all())


def test_late_steps_are_the_last_eleven_equally_often() -> None:
    for steps in (draw("refl")["i"], draw("drtune")["stop"]):
        counts = torch.bincount(steps, minlength=STEPS)
        assert counts[:14].sum() == 0
        assert bool(((counts[14:] - COUNT / 11).abs() < 5 * (COUNT / 11) ** 0.5).all())


def test_drtune_steps_are_equally_spaced_up_to_the_stop() -> None:
    drawn = draw("drtune", active_steps=3)
    stop, active = drawn["stop"], drawn["active"]
    gaps = active.diff(dim=0)
    assert torch.equal(gaps[0], gaps[1])
    assert torch.equal(gaps[0], (stop + 1) // 3)
    assert bool(((active >= 0) & (active <= stop)).all())
    assert bool((active[-1] == stop).any()), "the stop itself can be active"
    short = draw("drtune", active_steps=4, steps=3, last_steps=3)
    assert torch.equal((short["active"] >= 0).sum(dim=0), short["stop"] + 1), "a short prefix is taken whole"


def test_sparse_probabilities_are_those_of_successive_draws() -> None:
    """Two of four steps with weights 1, 4, 9, 16: P(a, b) = p_a p_b / (1 - p_a) + p_b p_a / (1 - p_b)."""
    active = draw("flowbp_sparse", steps=4, count=20_000, active_steps=2)["active"]
    seen = Counter(map(tuple, active.T.tolist()))
    p = [weight / 30 for weight in (1, 4, 9, 16)]
    for a, b in itertools.combinations(range(4), 2):
        expected = p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b]))
        error = (expected * (1 - expected) / 20_000) ** 0.5
        assert abs(seen[a, b] / 20_000 - expected) < 5 * error


def test_bridge_shares_its_steps_out_by_length() -> None:
    drawn = draw("flowbp_bridge")
    j, before, after = drawn["j"], drawn["before"], drawn["after"]
    early, late = (before >= 0).sum(dim=0), (after >= 0).sum(dim=0)
    assert bool((early + 1 + late == 5).all())
    assert bool((early >= 1).all())
    assert bool((before < j).all())
    assert bool(((after > j) | (after < 0)).all())
    # 5 j / 25 steps before j, rounded, and at least one on each side.
    expected = torch.tensor([min(4, max(1, round(int(one) / 5))) for one in j])
    assert torch.equal(early, torch.minimum(torch.maximum(expected, 5 - (STEPS - j)), j))


def test_later_steps_are_drawn_more_often() -> None:
    active = draw("flowbp_sparse")["active"]
    assert float((active >= STEPS / 2).double().mean()) > 0.75
    bridge = draw("flowbp_bridge")
    j, before, after = bridge["j"], bridge["before"], bridge["after"]
    assert float((before >= j / 2)[before >= 0].double().mean()) > 0.65
    assert float((after - j >= (STEPS - j) / 2)[after >= 0].double().mean()) > 0.65


@pytest.mark.parametrize("leaps", [1, 2, 3])
@pytest.mark.parametrize("draws", ["uniform", "fixed_gap", "midpoint", "dirichlet"])
def test_leaps_start_in_order_within_the_range(draws: str, leaps: int) -> None:
    concentration = [2.0] * (leaps + 1)
    options = {"draws": draws, "leaps": leaps, "gap": 3, "concentration": concentration, "index_range": [4, 12]}
    drawn = draw("leapalign", **options)
    assert list(drawn) == ["k", "j", "m"][:leaps]
    starts = torch.stack(list(drawn.values()))
    assert bool((starts.diff(dim=0) > 0).all())
    assert (int(starts.min()), int(starts[0].max())) >= (4, 4)
    assert int(starts.max()) <= 12
    if draws == "fixed_gap":
        assert bool((starts.diff(dim=0) == 3).all())
    assert len(starts[0].unique()) > 1


def test_midpoint_is_half_way_to_the_end() -> None:
    drawn = draw("leapalign", draws="midpoint")
    assert torch.equal(drawn["j"], (drawn["k"] + STEPS) // 2)


def test_dirichlet_means_follow_the_concentration() -> None:
    drawn = draw("leapalign", draws="dirichlet")
    # 2, 6 and 2.5 parts of 25 steps, each cut down to whole steps.
    assert float(drawn["k"].double().mean()) == pytest.approx(25 * 2 / 10.5 - 0.5, abs=0.25)
    assert float(drawn["j"].double().mean()) == pytest.approx(25 * 8 / 10.5 - 0.5, abs=0.25)


def test_one_draw_for_a_rollout_or_one_for_each_image() -> None:
    assert len(draw("leapalign", per_image=False)["k"].unique()) == 1
    assert len(draw("leapalign", per_image=True)["k"].unique()) == 24


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("leapalign", {"index_range": [3, 30]}, "not a range of the steps 0 to 24"),
        ("leapalign", {"index_range": [3, 3]}, "2 leaps need at least 2"),
        ("leapalign", {"draws": "fixed_gap", "gap": 25}, "gap 25"),
        ("leapalign", {"draws": "dirichlet", "leaps": 3}, "4 parts"),
        ("leapalign", {"draws": "midpoint", "index_range": [3, 3]}, "leaps need at least"),
    ],
)
def test_what_cannot_be_drawn_is_said(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("leapalign", {"leaps": 4}, "leaps"),
        ("leapalign", {"leaps": 1, "weigh_by": "connectors"}, "no connector"),
        ("leapalign", {"draws": "unifrom"}, "draws"),
        ("flowbp_bridge", {"active_steps": 1}, "greater than or equal to 2"),
        ("draft_k", {"steps": 0}, "steps"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_method(name, **options)
