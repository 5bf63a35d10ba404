"""Tensors that are spread over processes: each of two computes its part of what one would."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from kernel_cases import latents
from leap_kernels import (
    Adam8bitState,
    accumulate_,
    adamw_8bit_step_many_,
    combine_gradient_terms,
    consistency_weighted_loss,
    ema_update_,
    euler_step,
    leap_distances,
    leap_update,
    scale_gradient,
    stochastic_round_,
    total_norm,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

SIGMAS = torch.rand(4, generator=torch.Generator().manual_seed(0))
ELEMENTS = {
    "euler_step": lambda x, v: euler_step(x, v, SIGMAS, 0.1),
    "euler_step/guidance": lambda x, v: euler_step(x, v, 0.9, 0.1, v, SIGMAS),
    "leap_update": lambda x, v: leap_update(x, v, SIGMAS, 0.1)[0],
    "scale_gradient": lambda x, v: scale_gradient(x + v, SIGMAS),
    "ema_update_": lambda x, v: ema_update_(x.detach() + 0, v, 0.9),
    "accumulate_": lambda x, v: accumulate_(x.detach() + 0, v),
}
SAMPLES = {
    "leap_update/target": lambda x, v: leap_update(x, v, SIGMAS, 0.1, v),
    "leap_distances": lambda x, v: leap_distances(x, v, v, x, x, SIGMAS, 0.1),
    "combine_gradient_terms": lambda x, v: combine_gradient_terms(x, v, SIGMAS, 0.3, 0.5),
}


@pytest.fixture(params=[0, 1], ids="process {}".format)
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """Of two processes, of which there is one; the other is never heard."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    # PyTorch remembers by the mesh where this process's part lies: meshes of both processes may not be equal.
    yield init_device_mesh("cpu", (2,), mesh_dim_names=(f"process {request.param}",))
    dist.destroy_process_group()


def part(whole: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    return whole.chunk(2, placement.dim)[mesh.get_rank()] if isinstance(placement, Shard) else whole


def spread(whole: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return DTensor.from_local(part(whole, mesh, placement).clone(), mesh, [placement], run_check=False)


def check(op: Callable[..., object], mesh: DeviceMesh, placement: Placement) -> None:
    """Values and gradients are the parts of those of whole tensors."""
    whole = [latents(4, 6, dtype=torch.float32).requires_grad_() for _ in range(2)]
    parts = [spread(tensor.detach(), mesh, placement).requires_grad_() for tensor in whole]
    expected, found = op(*whole), op(*parts)
    expected, found = ((r,) if isinstance(r, Tensor) else r for r in (expected, found))
    for right, ours in zip(expected, found, strict=True):
        assert isinstance(ours, DTensor)
        assert ours.shape == right.shape
        assert torch.equal(ours.to_local(), part(right, mesh, placement))
    if expected[0].requires_grad:
        expected[0].square().sum().backward()
        weighted = found[0].to_local().square().sum()
        weighted.backward()
        for right, ours in zip(whole, parts, strict=True):
            if right.grad is not None:
                assert torch.equal(ours.grad.to_local(), part(right.grad, mesh, placement))


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
@pytest.mark.parametrize("name", ELEMENTS)
def test_ops_of_elements_take_any_part(name: str, placement: Placement, mesh: DeviceMesh) -> None:
    check(ELEMENTS[name], mesh, placement)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_ops_of_samples_take_whole_samples(name: str, placement: Placement, mesh: DeviceMesh) -> None:
    check(SAMPLES[name], mesh, placement)


@pytest.mark.parametrize("name", SAMPLES)
def test_parts_of_samples_are_refused(name: str, mesh: DeviceMesh) -> None:
    x = spread(latents(4, 6, dtype=torch.float32), mesh, Shard(1))
    with pytest.raises(TypeError, match=f"{name.partition('/')[0]} cannot compute from parts"):
        SAMPLES[name](x, x)


def test_what_needs_everything_is_refused(mesh: DeviceMesh) -> None:
    """The mean over a batch; and random bits, which are those of an element's position in the whole."""
    x = spread(torch.ones(4), mesh, Shard(0))
    with pytest.raises(TypeError, match="consistency_weighted_loss needs tensors divided alike"):
        consistency_weighted_loss(x, [x], 0.5, 0.1)
    with pytest.raises(TypeError, match="stochastic_round_ cannot compute from parts"):
        stochastic_round_(spread(torch.ones(4, dtype=torch.bfloat16), mesh, Shard(0)), x, 0, 0)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_lists_of_parts_are_refused_and_their_parts_are_not(placement: Placement, mesh: DeviceMesh) -> None:
    """A norm of parts is not the whole's, and a step draws the bits of positions in the whole."""
    weight, gradient = (spread(torch.ones(512), mesh, placement) for _ in range(2))
    plain = torch.ones(512)

    def step(parameters: list[Tensor], gradients: list[Tensor]) -> None:
        adamw_8bit_step_many_(
            *(parameters, gradients, [Adam8bitState.zeros_like(parameter) for parameter in parameters]),
            **{"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "seed": 0},
            **{"steps": [1] * len(parameters), "offsets": [0] * len(parameters)},
        )

    with pytest.raises(TypeError, match=r"total_norm takes lists of tensors .* pass to_local\(\) of each DTensor"):
        total_norm([plain, gradient])
    with pytest.raises(TypeError, match=r"adamw_8bit_step_many_ takes lists of tensors .* pass to_local\(\) of each"):
        step([plain, weight], [plain, gradient])
    local = gradient.to_local()
    assert total_norm([local]) == local.norm()
    step([weight.to_local()], [local])
    assert torch.equal(weight.to_local(), part(torch.full((512,), 0.999), mesh, placement))


def test_sums_that_are_not_yet_added_up_are_refused(mesh: DeviceMesh) -> None:
    x = DTensor.from_local(torch.ones(4, 6), mesh, [Partial()], run_check=False)
    with pytest.raises(TypeError, match="euler_step cannot compute from parts"):
        euler_step(x, x, 0.9, 0.1)


def test_tensors_divided_in_different_ways_are_refused(mesh: DeviceMesh) -> None:
    x, v = (spread(torch.ones(4, 6), mesh, placement) for placement in (Shard(0), Shard(1)))
    with pytest.raises(TypeError, match="euler_step needs tensors divided alike"):
        euler_step(x, v, 0.9, 0.1)
