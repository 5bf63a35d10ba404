"""Where methods draw their steps: ranges, spacing, probabilities, and seeds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
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


def flowbp_starts(gammas: Sequence[float], steps: int, cap: int | None = None) -> tuple[int, int]:
    """FlowBP's rule for one draw: steps counted from the image, A up to j, B from there to k, C beyond."""
    shares = [one / sum(gammas) for one in gammas]
    lengths = [round(share * steps) for share in shares]
    lengths[shares.index(max(shares))] += steps - sum(lengths)
    lengths = [max(1, length) for length in lengths]
    lengths[lengths.index(max(lengths))] += steps - sum(lengths)
    a, b, _ = lengths
    if cap is not None:
        a = min(a, cap - 1)
    return steps - (a + b + 1), steps - (a + 1)


@pytest.mark.parametrize("cap", [None, 10])
def test_lagrange_draws_as_flowbp_does(cap: int | None) -> None:
    """Every k, j and gap as often as by the rule written out, with gamma variables of its own."""
    gammas = np.random.default_rng(1).gamma((2.5, 6.0, 2.0), size=(20_000, 3)).tolist()
    k, j = torch.tensor([flowbp_starts(one, STEPS, cap) for one in gammas]).T
    drawn = draw("flowbp_lagrange", count=20_000, longest_last_leap=cap)
    for expected, seen in ((k, drawn["k"]), (j, drawn["j"]), (j - k, drawn["j"] - drawn["k"])):
        p, q = (torch.bincount(one, minlength=STEPS) / 20_000 for one in (expected, seen))
        assert bool(((p - q).abs() <= 5 * (2 * p.clamp(min=1e-4) / 20_000) ** 0.5).all())


def test_how_often_lagrange_starts_from_noise_and_from_the_last_step() -> None:
    """k = 0 where k's share, Beta(2, 8.5), rounds to one step or none: 1 - .94^8.5 (1 + 8.5 * .06) = 10.76 %.

    With cumulative shares cut down instead, as here before, it is 1 - .96^8.5 (1 + 8.5 * .04) = 5.29 %, and j the last
    step in 1.7 %.
    """
    cut = torch.from_numpy(
        np.random.default_rng(1).dirichlet((2.0, 6.0, 2.5), size=100_000).cumsum(axis=1) * STEPS
    ).long()
    assert float((cut[:, 0] == 0).double().mean()) == pytest.approx(0.0529, abs=0.004)
    assert float((cut[:, 1] == STEPS - 1).double().mean()) == pytest.approx(0.017, abs=0.002)
    drawn = draw("flowbp_lagrange", count=100_000)
    assert float((drawn["k"] == 0).double().mean()) == pytest.approx(0.1076, abs=0.005)
    assert int(drawn["j"].max()) == STEPS - 2


def test_the_longest_last_leap_moves_both_starts() -> None:
    free, capped = (draw("flowbp_lagrange", count=20_000, longest_last_leap=cap) for cap in (None, 10))
    assert torch.equal(capped["j"], free["j"].clamp(min=15))
    assert torch.equal(capped["j"] - capped["k"], free["j"] - free["k"])
    assert float((free["j"] < 15).double().mean()) == pytest.approx(0.14, abs=0.01)


@pytest.mark.parametrize("leaps", [1, 2, 3])
def test_dirichlet_means_follow_the_concentration(leaps: int) -> None:
    drawn = draw("leapalign", draws="dirichlet", leaps=leaps, concentration=(6.0,) * (leaps + 1))
    for number, starts in enumerate(drawn.values(), start=1):
        # The last step of so many equal parts.
        assert float(starts.double().mean()) == pytest.approx(STEPS * number / (leaps + 1) - 1, abs=0.25)


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
        ("flowbp_lagrange", {"longest_last_leap": 1}, "greater than or equal to 2"),
        ("flowbp_lagrange", {"longest_last_leap": 3, "index_range": [0, 4]}, "leave one out"),
        ("draft_k", {"steps": 0}, "steps"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_method(name, **options)
