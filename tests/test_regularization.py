"""The distance to the base's velocities and its gradient: against autograd, method by method, and with adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import inline
import pytest
import torch
from diffusers.models.transformers import transformer_flux
from small_models import small_flux, small_vae
from torch import Tensor, nn
from worlds import World, conditioned_world, flux_embeddings, relative_difference

from leapalign.config import ModelConfig
from leapalign.memory.base_weights import BaseWeights
from leapalign.method_gradient import draw_several, joined
from leapalign.methods import get_method
from leapalign.models.flux import FluxModel
from leapalign.models.lora import add_adapter, planned_adapter, without_adapter
from leapalign.models.velocity import GuidedEmbeddings, prompted_velocity
from leapalign.regularization import BaseVelocityPenalty
from leapalign.rollout import sample_rollout
from leapalign.surrogate import SurrogatePlan, surrogate_backward
from leapalign.tiny.model import build_scheduler

WEIGHT, CPU = 3.0, torch.device("cpu")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("refl", {}),
    ("draft_lv", {}),
    ("draft_k", {"steps": None}),
    ("drtune", {}),
    ("leapalign", {"alpha": 0.7}),
    ("leapalign", {"alpha": 0.0}),
    ("leapalign", {"alpha": 0.7, "leaps": 3, "max_ratio": 0.05}),
    ("flowbp_sparse", {}),
    ("flowbp_bridge", {}),
    ("flowbp_lagrange", {}),
]
Base = Callable[[], contextlib.AbstractContextManager[None]]


def without_float32(transformer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Norms and rotations gone that compute in float32: one backward of a sum would not be the sum of two."""
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", lambda values, *_, **__: values)
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "RMSNorm":
                setattr(module, name, nn.Identity())
    return transformer


def moved(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)


def staged(world: World, base: Base, name: str, options: dict[str, Any], draws: int = 1, **how: Any) -> Tensor:
    """Gradients of a method's loss and the penalty by the engine."""
    method, indices = get_method(name, **options), drawn(world, name, options, draws)
    trajectory = method.trajectory(world.rollout, world.velocity, **indices)
    velocity = world.velocity.select(torch.arange(trajectory.batch_size) % world.rollout.batch_size)
    plan = method.plan(trajectory.sigmas, **indices)
    _, apart = BaseVelocityPenalty(WEIGHT, base).measured(plan, trajectory, velocity)
    gradient = x0_gradient(world, plan.index.shape[1])
    surrogate_backward(plan, trajectory, velocity, gradient, velocity_gradient=apart, **how)
    return world.gradients()


def written_out(world: World, base: Base, name: str, options: dict[str, Any], draws: int = 1) -> tuple[Tensor, Tensor]:
    """The gradients of both by autograd: the method's graph of `inline`, and the mean of squares, entry by entry."""
    method, indices = get_method(name, **options), drawn(world, name, options, draws)
    columns = inline.columns(name, indices)
    gradient = x0_gradient(world, len(columns))
    for column, of_column in enumerate(columns):
        known = {**options, "gradient": gradient[column]}
        end = inline.METHODS[name](inline.Image(world, column), known, **of_column)
        (end * gradient[column]).sum().backward()
    plain = world.gradients()
    trajectory = method.trajectory(world.rollout, world.velocity, **indices)
    plan = method.plan(trajectory.sigmas, **indices)
    entries = []
    for column in range(len(columns)):
        rows = [row for row in range(len(plan.index)) if plan.coefficient[row, column] != 0]
        for row in rows:
            step, sample = int(plan.index[row, column]), column % trajectory.batch_size
            velocity = world.velocity.select(torch.tensor([sample % world.rollout.batch_size]))
            at = trajectory.latents[step, sample][None].detach(), trajectory.sigmas[step][None]
            entries.append((velocity, at, 1 / (len(rows) * len(columns))))
    # Before there is a graph, which would miss the weights that it was made with.
    with torch.no_grad(), base():
        targets = [velocity(*at) for velocity, at, _ in entries]
    terms = [
        share * (velocity(*at) - target).square().mean()
        for (velocity, at, share), target in zip(entries, targets, strict=True)
    ]
    penalty = torch.stack(terms).sum()
    (WEIGHT * penalty).backward()
    return plain, plain + world.gradients()


def drawn(world: World, name: str, options: dict[str, Any], draws: int) -> dict[str, Tensor]:
    generator, rollout = torch.Generator().manual_seed(5), world.rollout
    return joined(draw_several(get_method(name, **options), draws, rollout.num_steps, rollout.batch_size, generator))


def x0_gradient(world: World, columns: int) -> Tensor:
    shape = (columns, *world.rollout.latents.shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def moved_world() -> tuple[World, Base]:
    """A network that left its base, with a rollout of its own."""
    world = conditioned_world((3, 4, 2), batch=2, steps=7)
    base = BaseWeights(world.parameters, CPU).lent
    moved(world.parameters)
    world.rollout = sample_rollout(world.velocity, world.rollout.latents[0], world.rollout.sigmas)
    return world, base


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_the_gradient_is_autograds(name: str, options: dict[str, Any], draws: int) -> None:
    """Nothing of the penalty flows through inputs, where discounts let the method's own gradient through."""
    world, base = moved_world()
    plain, expected = written_out(world, base, name, options, draws)
    assert relative_difference(expected, plain) > 1e-2, "the penalty matters"
    for microbatch in (None, 1, 2):
        found = staged(world, base, name, options, draws, microbatch=microbatch)
        assert relative_difference(found, expected) <= 1e-10


@pytest.mark.parametrize("guided", ["no", "batched", "one by one"])
@pytest.mark.parametrize("kind", ["full", "adapters"])
@pytest.mark.parametrize("name", ["leapalign", "draft_k"])
def test_a_flux_with_and_without_adapters_and_guidance(
    kind: str, guided: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classifier-free guidance's velocity is compared as a whole, whichever way its branches are computed.

    One image at a time throughout: the sines of noise levels are float32 in FLUX, and differ by the size of a batch.
    """
    transformer = without_float32(small_flux().double(), monkeypatch)
    if kind == "adapters":
        add_adapter(transformer, planned_adapter(transformer, ModelConfig(lora_rank=2, lora_alpha=3.0)))
        transformer.double()
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    base = BaseWeights(parameters, CPU).lent if kind == "full" else lambda: without_adapter(transformer)
    moved(parameters)
    model = FluxModel(transformer, build_scheduler(), 64, 64, small_vae())
    embeddings: Any = flux_embeddings(1, torch.float64)
    if guided != "no":
        embeddings = GuidedEmbeddings(embeddings, flux_embeddings(1, torch.float64), 2.5, guided == "batched")
    velocity = prompted_velocity(model, embeddings)
    noise = torch.randn(1, 16, 16, dtype=torch.float64)
    rollout = sample_rollout(velocity, noise, model.sigmas(5).double())
    world = World(velocity, parameters, rollout, noise)
    plain, expected = written_out(world, base, name, {}, draws=2)
    assert relative_difference(expected, plain) > 1e-3
    assert relative_difference(staged(world, base, name, {}, draws=2, microbatch=1), expected) <= 1e-10
    assert all(parameter.requires_grad for parameter in parameters)


def test_gradients_leave_as_they_complete() -> None:
    world, base = moved_world()
    _, expected = written_out(world, base, "leapalign", {"alpha": 0.7})
    sums = {parameter: torch.zeros_like(parameter) for parameter in world.parameters}

    def sink(parameter: Tensor, gradient: Tensor) -> None:
        sums[parameter] += gradient

    staged(world, base, "leapalign", {"alpha": 0.7}, gradient_sink=sink)
    found = torch.cat([sums[parameter].flatten() for parameter in world.parameters])
    assert relative_difference(found, expected) <= 1e-10


def test_the_distance_is_a_mean_and_absent_samples_have_none() -> None:
    world, base = moved_world()
    plan = SurrogatePlan(
        torch.tensor([[1, 2], [3, 4]]), torch.tensor([[-0.5, 0.0], [-0.5, -0.5]]), torch.tensor([0.0, 0.3])
    )
    distance, apart = BaseVelocityPenalty(1.0, base).measured(plan, world.rollout, world.velocity)
    for column, entries in enumerate([[(0, 1), (1, 3)], [(1, 4)]]):
        found = []
        for _, step in entries:
            x, sigma = world.rollout.latents[step, column][None], world.rollout.sigmas[step][None]
            own = world.velocity.select(torch.tensor([column]))
            with torch.no_grad():
                v = own(x, sigma)
                with base():
                    found.append((v - own(x, sigma)).square().mean())
        torch.testing.assert_close(distance[column], torch.stack(found).mean())
    assert bool((apart[0, 1] == 0).all()), "an entry without a coefficient has no gradient"
    nothing, _ = BaseVelocityPenalty(1.0, contextlib.nullcontext).measured(plan, world.rollout, world.velocity)
    assert float(nothing.abs().max()) < 1e-25
    absent = SurrogatePlan(plan.index, torch.zeros(2, 2), plan.discount)
    distance, apart = BaseVelocityPenalty(1.0, base).measured(absent, world.rollout, world.velocity)
    assert not distance.any()
    assert not apart.any()


def test_weights_come_back_to_the_bit_whatever_happens() -> None:
    world, base = moved_world()
    before = deepcopy([parameter.detach() for parameter in world.parameters])

    @contextlib.contextmanager
    def failing() -> Iterator[None]:
        with base():
            assert not torch.equal(world.parameters[0], before[0])
            raise MemoryError
        yield

    with pytest.raises(MemoryError), failing():
        pass
    with base():
        pass
    assert all(torch.equal(one, other) for one, other in zip(world.parameters, before, strict=True))


def test_a_gradient_of_another_shape_is_refused() -> None:
    world, _ = moved_world()
    method = get_method("leapalign")
    plan = method.plan(world.rollout.sigmas, **drawn(world, "leapalign", {}, 1))
    with pytest.raises(ValueError, match=r"velocity_gradient must have the shape of x0_gradient for each row"):
        surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient, velocity_gradient=world.x0_gradient)
