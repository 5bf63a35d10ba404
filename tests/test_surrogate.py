"""The staged backward pass against autograd graphs written out in line, from the papers' formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from worlds import World, conditioned_world, flux_world, relative_difference, vector_world

from leapalign.methods import get_method
from leapalign.rollout import Rollout
from leapalign.surrogate import SurrogatePlan, surrogate_backward

WORLDS = {
    "vector": lambda: vector_world((6,), batch=4, steps=7),
    "image": lambda: vector_world((3, 4, 2), batch=3, steps=5),
    "flux": lambda: flux_world(batch=3, steps=6, dtype=torch.float64),
}


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]()


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def inline_leapalign(world: World, k: Tensor, j: Tensor, alpha: float) -> Tensor:
    """LA 4-10 as one graph: two leaps, latent connectors, gradient discounting. Returns parameter gradients."""
    rollout, samples = world.rollout, torch.arange(len(k))
    x_k, x_j, x_end = rollout.latents[k, samples], rollout.latents[j, samples], rollout.latents[-1]
    sigma_k, sigma_j = rollout.sigmas[k], rollout.sigmas[j]
    predicted_j = x_k - column(sigma_k - sigma_j, x_k) * world.velocity(x_k, sigma_k)
    connected_j = predicted_j + (x_j - predicted_j).detach()
    discounted = alpha * connected_j + (1 - alpha) * connected_j.detach()
    predicted_end = connected_j - column(sigma_j, x_j) * world.velocity(discounted, sigma_j)
    connected_end = predicted_end + (x_end - predicted_end).detach()
    (connected_end * world.x0_gradient).sum().backward()
    return world.gradients()


def staged_leapalign(world: World, k: Tensor, j: Tensor, alpha: float, **options: object) -> Tensor:
    plan = get_method("leapalign", alpha=alpha).plan(world.rollout.sigmas, k=k, j=j)
    surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient, **options)
    return world.gradients()


def draw(world: World) -> dict[str, Tensor]:
    return get_method("leapalign").draw(
        world.rollout.num_steps, world.rollout.batch_size, torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_staged_leapalign_is_the_inline_graph(world: World, alpha: float) -> None:
    indices = draw(world)
    assert len(set(zip(indices["k"].tolist(), indices["j"].tolist(), strict=True))) > 1, "per-image (k, j)"
    inline = inline_leapalign(world, **indices, alpha=alpha)
    assert relative_difference(staged_leapalign(world, **indices, alpha=alpha), inline) <= 1e-10


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_staged_leapalign_is_the_inline_graph_in_float32(alpha: float) -> None:
    world = flux_world(batch=4, steps=6, dtype=torch.float32)
    indices = draw(world)
    inline = inline_leapalign(world, **indices, alpha=alpha)
    assert relative_difference(staged_leapalign(world, **indices, alpha=alpha), inline) <= 1e-5


def test_alpha_matters(world: World) -> None:
    indices = draw(world)
    full, none = (staged_leapalign(world, **indices, alpha=alpha) for alpha in (1.0, 0.0))
    assert relative_difference(full, none) > 1e-3


def test_all_rows_undiscounted_are_autograd_through_the_sampler(world: World) -> None:
    """Exact backpropagation (AlignProp, DRaFT): every row, Euler coefficients, discount 1."""
    sigmas, batch = world.rollout.sigmas, world.rollout.batch_size
    steps = world.rollout.num_steps
    x = world.rollout.latents[0]
    for t in range(steps):
        x = x + (sigmas[t + 1] - sigmas[t]) * world.velocity(x, sigmas[t].expand(batch))
    (x * world.x0_gradient).sum().backward()
    inline = world.gradients()
    plan = SurrogatePlan(
        index=torch.arange(steps)[:, None].expand(steps, batch),
        coefficient=sigmas.diff()[:, None].expand(steps, batch),
        discount=torch.ones(steps),
    )
    surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient)
    assert relative_difference(world.gradients(), inline) <= 1e-10


@pytest.mark.parametrize("microbatch", [1, 2, 3, 100])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_microbatches_change_nothing(microbatch: int, alpha: float) -> None:
    world = vector_world((6,), batch=4, steps=7)
    indices = draw(world)
    whole = staged_leapalign(world, **indices, alpha=alpha)
    parts = staged_leapalign(world, **indices, alpha=alpha, microbatch=microbatch)
    assert relative_difference(parts, whole) <= 1e-13


@pytest.mark.parametrize(("discount", "calls"), [((0.0, 0.0, 0.0), [6, 3]), ((0.0, 0.5, 0.0), [6, 3])])
def test_rows_that_share_a_cotangent_run_as_one_batch(discount: tuple[float, ...], calls: list[int]) -> None:
    world = conditioned_world((6,), batch=3, steps=7)
    world.velocity.calls.clear()
    plan = SurrogatePlan(
        index=torch.tensor([[0, 1, 0], [2, 3, 4], [5, 4, 6]]),
        coefficient=torch.randn(3, 3, dtype=torch.float64),
        discount=torch.tensor(discount),
    )
    surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient)
    assert world.velocity.calls == [3, 3, 3]
    row_by_row = world.gradients()
    world.velocity.calls.clear()
    surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient, microbatch=6)
    assert world.velocity.calls == calls
    assert relative_difference(world.gradients(), row_by_row) <= 1e-13


def test_gradient_sink_gets_every_gradient_and_leaves_none(world: World) -> None:
    indices = draw(world)
    accumulated = staged_leapalign(world, **indices, alpha=0.3)
    received: dict[Tensor, Tensor] = {}

    def sink(parameter: Tensor, gradient: Tensor) -> None:
        received[parameter] = received.get(parameter, 0) + gradient

    plan = get_method("leapalign", alpha=0.3).plan(world.rollout.sigmas, **indices)
    surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient, gradient_sink=sink)
    assert all(parameter.grad is None for parameter in world.parameters)
    parts = [received.get(p, torch.zeros_like(p)).flatten() for p in world.parameters]
    assert relative_difference(torch.cat(parts), accumulated) <= 1e-13


def test_gradient_term_norms() -> None:
    world = vector_world((6,), batch=4, steps=7)
    indices = draw(world)
    plan = get_method("leapalign", alpha=0.0).plan(world.rollout.sigmas, **indices)
    norms = surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient)
    expected = plan.coefficient.abs() * world.x0_gradient.norm(dim=1)
    torch.testing.assert_close(norms, expected.float())


GOOD = SurrogatePlan(
    index=torch.tensor([[0, 1], [2, 3]]), coefficient=torch.ones(2, 2), discount=torch.tensor([0.0, 0.3])
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.tensor([[2, 1], [2, 3]])}, "sampling order"),
        ({"index": torch.tensor([[-1, 1], [2, 3]])}, "negative"),
        ({"index": torch.tensor([[0.0, 1.0], [2.0, 3.0]])}, "int64"),
        ({"index": torch.tensor([0, 1])}, "shape"),
        ({"coefficient": torch.ones(2, 3)}, "coefficient must have the shape"),
        ({"coefficient": torch.full((2, 2), float("nan"))}, "finite"),
        ({"discount": torch.zeros(3)}, "discount must have shape"),
        ({"discount": torch.tensor([0.0, float("inf")])}, "finite"),
    ],
)
def test_bad_plans_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, **change)


@pytest.mark.parametrize(
    ("batch", "steps", "gradient_shape", "microbatch", "message"),
    [
        (3, 5, (3, 6), None, "2 samples"),
        (2, 3, (2, 6), None, "out of range"),
        (2, 5, (2, 7), None, "x0_gradient"),
        (2, 5, (2, 6), 0, "microbatch"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_forward(
    batch: int, steps: int, gradient_shape: tuple[int, ...], microbatch: int | None, message: str
) -> None:
    rollout = Rollout(torch.zeros(steps + 1, batch, 6), torch.zeros(steps, batch, 6), torch.linspace(1, 0, steps + 1))

    def never(latents: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("a forward ran")

    with pytest.raises(ValueError, match=message):
        surrogate_backward(GOOD, rollout, never, torch.zeros(gradient_shape), microbatch=microbatch)
