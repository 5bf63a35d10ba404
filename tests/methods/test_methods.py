"""Every method through the engine, against the graphs of `inline`: gradients, and what is rewarded."""

from __future__ import annotations

from typing import Any

import inline
import pytest
import torch
from torch import Tensor
from worlds import World, conditioned_world, flux_world, relative_difference

from leapalign.method_gradient import draw_several, joined
from leapalign.methods import METHODS, get_method
from leapalign.surrogate import surrogate_backward

WORLDS = {
    "vector": lambda: conditioned_world((6,), batch=3, steps=9),
    "image": lambda: conditioned_world((3, 4, 2), batch=2, steps=6),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("refl", {}),
    ("refl", {"last_steps": 2}),
    ("draft_lv", {}),
    ("draft_lv", {"copies": 0}),
    ("draft_k", {}),
    ("draft_k", {"steps": 3}),
    ("draft_k", {"steps": None}),
    ("drtune", {}),
    ("drtune", {"active_steps": 4, "last_steps": 5}),
    ("leapalign", {}),
    ("leapalign", {"alpha": 0.0}),
    ("leapalign", {"alpha": 1.0, "leaps": 1}),
    ("leapalign", {"alpha": 0.7, "leaps": 3}),
    ("leapalign", {"alpha": 0.7, "leaps": 3, "max_ratio": 0.05}),
    ("leapalign", {"alpha": 0.7, "max_ratio": 0.02}),
    ("leapalign", {"alpha": 0.7, "max_ratio": 1e6}),
    ("leapalign", {"index_range": (1, 4)}),
    ("refl", {"index_range": (1, 4)}),
    ("draft_lv", {"tail_ratio": 0.5, "per_image": False}),
    ("draft_k", {"tail_ratio": 0.5}),
    ("drtune", {"index_range": (1, 4)}),
    ("flowbp_sparse", {"index_range": (1, 4)}),
    ("flowbp_bridge", {"tail_ratio": 0.6, "per_image": False}),
    ("flowbp_bridge", {"index_range": (1, 4)}),
    ("flowbp_lagrange", {"index_range": (0, 3)}),
    ("flowbp_lagrange", {"tail_ratio": 0.7, "longest_last_leap": 3}),
    ("leapalign", {"draws": "fixed_gap", "gap": 2}),
    ("leapalign", {"draws": "midpoint", "leaps": 3}),
    ("leapalign", {"draws": "dirichlet", "per_image": False}),
    ("leapalign", {"reward_on": "posterior_mean"}),
    ("flowbp_sparse", {}),
    ("flowbp_sparse", {"active_steps": 2, "rescale": 0.3, "late_bias": 0.0}),
    ("flowbp_bridge", {}),
    ("flowbp_bridge", {"active_steps": 3, "alpha": 0.8, "rescale": 0.0}),
    ("flowbp_lagrange", {}),
    ("flowbp_lagrange", {"supports": 4, "active_supports": 3, "alpha": 0.6, "rescale": 0.0, "support_scale": 1.0}),
    ("flowbp_lagrange", {"supports": 1, "active_supports": 1}),
]


def case_name(case: tuple[str, dict[str, Any]]) -> str:
    return " ".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def staged(world: World, name: str, options: dict[str, Any], draws: int, **how: Any) -> tuple[Tensor, Tensor]:
    """Parameter gradients by the engine, and the rewarded latents, a column each."""
    method = get_method(name, **options)
    indices = draw(world, name, options, draws)
    trajectory = method.trajectory(world.rollout, world.velocity, **indices)
    velocity = world.velocity.select(torch.arange(trajectory.batch_size) % world.rollout.batch_size)
    plan = method.plan(trajectory.sigmas, **indices)
    count = plan.index.shape[1]
    surrogate_backward(plan, trajectory, velocity, x0_gradient(world, count), **how)
    rewarded = method.reward_latents(trajectory, **indices)
    return world.gradients(), rewarded[torch.arange(count) % len(rewarded)]


def inlined(world: World, name: str, options: dict[str, Any], draws: int) -> tuple[Tensor, Tensor]:
    """The same, written out."""
    drawn = inline.columns(name, draw(world, name, options, draws))
    gradient, ends = x0_gradient(world, len(drawn)), []
    for column, indices in enumerate(drawn):
        known = {**options, "gradient": gradient[column]}
        end = inline.METHODS[name](inline.Image(world, column), known, **indices)
        (end * gradient[column]).sum().backward()
        ends.append(end.detach())
    return world.gradients(), torch.stack(ends)


def draw(world: World, name: str, options: dict[str, Any], draws: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    rollout = world.rollout
    return joined(draw_several(get_method(name, **options), draws, rollout.num_steps, rollout.batch_size, generator))


def x0_gradient(world: World, columns: int) -> Tensor:
    shape = (columns, *world.rollout.latents.shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(world.x0_gradient)


def test_every_method_is_tested() -> None:
    assert {name for name, _ in CASES} == set(METHODS)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("world_name", WORLDS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=map(case_name, CASES))
def test_method_is_its_inline_graph(name: str, options: dict[str, Any], world_name: str, draws: int) -> None:
    world = WORLDS[world_name]()
    expected, ends = inlined(world, name, options, draws)
    gradients, rewarded = staged(world, name, options, draws)
    assert relative_difference(gradients, expected) <= 1e-10
    assert relative_difference(rewarded, ends) <= 1e-12
    for microbatch in (1, 2, 100):
        parts, _ = staged(world, name, options, draws, microbatch=microbatch)
        assert relative_difference(parts, gradients) <= 1e-12


@pytest.mark.parametrize(("name", "options"), CASES, ids=map(case_name, CASES))
def test_method_is_its_inline_graph_on_a_small_flux(name: str, options: dict[str, Any]) -> None:
    world = flux_world(batch=2, steps=7, dtype=torch.float32)
    expected, _ = inlined(world, name, options, draws=1)
    gradients, _ = staged(world, name, options, draws=1)
    assert relative_difference(gradients, expected) <= 1e-5


def test_applied_discount_is_what_the_ratio_leaves() -> None:
    """Smaller where the nested term is large, and the paper's where it is not."""
    world = WORLDS["vector"]()
    applied = {}
    for ratio in (0.02, 1e6):
        options = {"alpha": 0.7, "max_ratio": ratio}
        discount = torch.zeros(2, 3, dtype=torch.float64)
        staged(world, "leapalign", options, draws=1, applied_discount=discount)
        assert bool((discount[0] == 0).all()), "nothing flows into the first leap's input"
        applied[ratio] = discount[1]
        indices = inline.columns("leapalign", draw(world, "leapalign", options, 1))
        for column, one in enumerate(indices):
            known = {**options, "gradient": x0_gradient(world, 3)[column]}
            steps = [int(start) for start in one.values()]
            expected = inline.shrunk(inline.Image(world, column), steps, known)[1]
            assert float(discount[1, column]) == pytest.approx(expected, rel=1e-12)
    assert bool((applied[0.02] < 0.7).any())
    assert applied[1e6].tolist() == [0.7] * 3


def test_bridge_without_effect_is_the_sparse_method() -> None:
    """A negative control: with alpha 0 the same active set gives the same gradient, with alpha 1 another."""
    world = WORLDS["vector"]()
    j, before, after = torch.tensor([4, 4, 4]), torch.tensor([[1, 2, 0]]), torch.tensor([[6, 5, 8]])
    gradients = {}
    for alpha in (0.0, 1.0):
        plan = get_method("flowbp_bridge", alpha=alpha).plan(world.rollout.sigmas, j=j, before=before, after=after)
        surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient)
        gradients[alpha] = world.gradients()
    active = torch.cat([before, j[None], after])
    plan = get_method("flowbp_sparse").plan(world.rollout.sigmas, active=active)
    surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient)
    sparse = world.gradients()
    assert relative_difference(gradients[0.0], sparse) <= 1e-13
    assert relative_difference(gradients[1.0], sparse) > 1e-3
