"""The options on draws that all methods share: a range or a tail of the steps, and one draw for all images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.inputs.validation import UserError
from leapalign.methods import METHODS, get_method

STEPS, COUNT = 25, 4000
SIGMAS = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64) ** 0.7
AT_THE_END = ("draft_k", "draft_lv")
"""Those whose steps are the last ones, with nothing random about them."""
FREE = sorted(METHODS.keys() - set(AT_THE_END))
BEFORE: dict[str, dict[str, Any]] = {
    "refl": {"i": [17, 17, 15]},
    "draft_lv": {
        "noise_seed": [
            [1407639518939636932, 551904368352831990, 3475536756154880211],
            [4122204982959224423, 4205664258540301497, 710123494352685591],
        ]
    },
    "draft_k": {"first": [24, 24, 24]},
    "drtune": {"stop": [17, 17, 15], "active": [[2, 3, 0], [11, 12, 8]]},
    "leapalign": {"k": [17, 4, 0], "j": [19, 24, 4]},
    "flowbp_sparse": {"active": [[17, 16, 6], [19, 21, 12], [24, 24, 21]]},
    "flowbp_bridge": {
        "j": [19, 24, 4],
        "before": [[9, 15, 1], [16, 20, -1], [17, 21, -1], [18, 22, -1]],
        "after": [[-1, -1, 11], [-1, -1, 14], [-1, -1, 23]],
    },
}
"""What seed 7 drew for three images before these options were there; Lagrange's rule is another since."""


def draw(name: str, count: int = COUNT, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    return get_method(name, **options).draw(STEPS, count, torch.Generator().manual_seed(seed))


def carrying(name: str, **options: Any) -> Tensor:
    """The steps that carry gradient in the plan of many draws."""
    method = get_method(name, **options)
    plan = method.plan(SIGMAS, **method.draw(STEPS, COUNT, torch.Generator().manual_seed(0)))
    return plan.index[plan.coefficient != 0]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"flowbp_lagrange"}))
def test_without_options_draws_are_those_of_before(name: str) -> None:
    drawn = draw(name, count=3, seed=7)
    assert {key: value.tolist() for key, value in drawn.items()} == BEFORE[name]


def test_a_range_of_leaps_draws_as_before() -> None:
    drawn = draw("leapalign", count=3, seed=7, index_range=[4, 12], per_image=False)
    assert {key: value.tolist() for key, value in drawn.items()} == {"k": [5] * 3, "j": [10] * 3}


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize(("first", "last"), [(7, 24), (0, 9), (5, 15), (20, 22)])
def test_every_step_of_a_range_carries_gradient_and_no_other(name: str, first: int, last: int) -> None:
    found = carrying(name, index_range=[first, last]).unique().tolist()
    assert found[0] >= first
    assert found[-1] <= last
    # DRTune's stop is late in the range, and Lagrange's last leap has two steps at least.
    assert len(found) >= 0.9 * (last - first)


@pytest.mark.parametrize("name", METHODS)
def test_a_tail_is_the_range_of_the_last_steps(name: str) -> None:
    """FlowBP's tail of .7: ceil(17.5) = 18 of 25 steps, from step 7 on."""
    tail, given = draw(name, tail_ratio=0.7), draw(name, index_range=[7, 24])
    assert all(torch.equal(tail[key], given[key]) for key in tail)
    found = carrying(name, tail_ratio=0.7)
    assert int(found.min()) == (24 if name == "draft_lv" else 7)


@pytest.mark.parametrize("name", METHODS)
def test_one_draw_for_all_images(name: str) -> None:
    """The step is the same; DRaFT-LV's noise stays each image's own."""
    drawn = draw(name, per_image=False)
    for steps in drawn.values():
        assert steps.shape[-1] == COUNT
        assert bool((steps == steps[..., :1]).all()) == (name != "draft_lv")
    assert bool((carrying(name, per_image=False).view(-1, COUNT).diff(dim=1) == 0).all())


def test_one_draw_for_all_spreads_an_iterations_mean_eightfold() -> None:
    """Of 64 images: the earlier of two distinct steps of 25 has variance 2 (25 + 1) (25 - 2) / 36, 5.76 squared."""
    for per_image, expected in ((True, 5.76 / 8), (False, 5.76)):
        method, generator = get_method("leapalign", per_image=per_image), torch.Generator().manual_seed(0)
        means = torch.stack([method.draw(STEPS, 64, generator)["k"].double().mean() for _ in range(2000)])
        assert float(means.std()) == pytest.approx(expected, rel=0.08)


def test_sparse_keeps_its_weights_in_a_range() -> None:
    """Step i of 0 .. 24 has weight (i + 1)^2 there, too: steps 7 .. 9 have 64, 81 and 100 of 245."""
    active = draw("flowbp_sparse", count=20_000, active_steps=1, index_range=[7, 9])["active"][0]
    seen = torch.bincount(active, minlength=10)[7:] / 20_000
    torch.testing.assert_close(seen, torch.tensor([64, 81, 100]) / 245, atol=5 * 0.0035, rtol=0)


@pytest.mark.parametrize("name", ["flowbp_sparse", "flowbp_bridge"])
def test_a_full_rescale_makes_up_for_the_range_not_the_whole(name: str) -> None:
    """FlowBP's 1 + rho (sum_window |dsigma| / sum_active |dsigma| - 1), rho 1: coefficients sum to the window's."""
    method = get_method(name, rescale=1.0, tail_ratio=0.7)
    plan = method.plan(SIGMAS, **method.draw(STEPS, 50, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(plan.coefficient.sum(dim=0), -SIGMAS[7].expand(50))


def test_drtune_is_equally_spaced_within_its_range() -> None:
    drawn = draw("drtune", active_steps=3, index_range=[6, 20])
    stop, active = drawn["stop"], drawn["active"]
    assert sorted(stop.unique().tolist()) == list(range(10, 21)), "the last 11 of the range"
    assert bool((active.diff(dim=0) == (stop - 6 + 1) // 3).all())


@pytest.mark.parametrize("name", METHODS)
def test_contradicting_ranges_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="index_range and tail_ratio both say which steps"):
        get_method(name, index_range=[3, 24], tail_ratio=0.5)
    with pytest.raises(ValueError, match="not a range of the steps 0 to 24"):
        draw(name, index_range=[3, 25])
    with pytest.raises(UserError, match="tail_ratio"):
        get_method(name, tail_ratio=0)


@pytest.mark.parametrize(("name", "option"), [("refl", "last_steps"), ("draft_k", "steps")])
def test_an_own_range_beside_another_is_refused(name: str, option: str) -> None:
    for given in ({"index_range": [20, 24]}, {"tail_ratio": 0.2}):
        assert carrying(name, **given).unique().tolist() == [20, 21, 22, 23, 24]
        with pytest.raises(UserError, match=f"{option} and {next(iter(given))} both say"):
            get_method(name, **{option: 5}, **given)


@pytest.mark.parametrize(("name", "message"), [("draft_k", "end with the last step, 24"), ("draft_lv", "with it, 24")])
def test_methods_of_the_last_steps_refuse_a_range_without_them(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(name, index_range=[3, 20])
