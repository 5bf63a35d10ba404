from __future__ import annotations

import pytest
import tolerances
import torch
from kernel_cases import BACKENDS, HALVES_AND_FLOAT
from leap_kernels import consistency_weighted_loss, use_backend
from leap_kernels.consistency_weighted_loss import reference_backward, reference_forward

by_backend = pytest.mark.parametrize("backend", BACKENDS)
REWARD = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
DISTANCES = (
    torch.tensor([0.05, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([0.4, 0.01, 0.2], dtype=torch.float64),
)
# tau 0.1: sums of clamped distances are 0.5, 0.4, 0.4; threshold 0.6: hinges are 0.4, 0.1, 0.
WEIGHT = torch.tensor([2.0, 2.5, 2.5], dtype=torch.float64)
LOSS = torch.tensor((2.0 * 0.4 + 2.5 * 0.1) / 3, dtype=torch.float64)


def test_value_worked_by_hand() -> None:
    loss, weight = consistency_weighted_loss(REWARD, DISTANCES, 0.6, 0.1)
    torch.testing.assert_close(loss, LOSS)
    torch.testing.assert_close(weight, WEIGHT)


def test_gradient_worked_by_hand() -> None:
    reward = REWARD.clone().requires_grad_()
    distances = [d.clone().requires_grad_() for d in DISTANCES]
    loss, weight = consistency_weighted_loss(reward, distances, 0.6, 0.1)
    (3 * loss).backward()
    torch.testing.assert_close(reward.grad, torch.tensor([-2.0, -2.5, 0.0], dtype=torch.float64))
    assert not weight.requires_grad
    assert all(d.grad is None for d in distances)


def test_gradcheck_and_autograd_of_reference() -> None:
    reward = REWARD.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: consistency_weighted_loss(r, DISTANCES, 0.6, 0.1)[0], reward)
    loss, weight = reference_forward(reward, torch.stack(DISTANCES), 0.6, 0.1)
    (by_autograd,) = torch.autograd.grad(loss, reward)
    torch.testing.assert_close(reference_backward(torch.tensor(1.0), REWARD, weight, 0.6), by_autograd)


def test_no_gradient_at_the_threshold() -> None:
    reward = torch.tensor([0.5, 0.25], requires_grad=True)
    consistency_weighted_loss(reward, torch.ones(2), 0.5, 0.1)[0].backward()
    assert reward.grad.tolist() == [0.0, -0.5]


def test_one_tensor_a_sequence_and_a_stack_agree() -> None:
    expected = consistency_weighted_loss(REWARD, DISTANCES, 0.6, 0.1)
    for distances in (list(DISTANCES), torch.stack(DISTANCES)):
        torch.testing.assert_close(consistency_weighted_loss(REWARD, distances, 0.6, 0.1), expected)
    single = consistency_weighted_loss(REWARD, DISTANCES[0], 0.6, 0.1)
    torch.testing.assert_close(single, consistency_weighted_loss(REWARD, (DISTANCES[0],), 0.6, 0.1))
    torch.testing.assert_close(single[1], 1 / torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64))


@by_backend
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_half_precision_rewards_compute_in_float32(backend: str, dtype: torch.dtype) -> None:
    reward = REWARD.to(dtype).requires_grad_()
    with use_backend(backend, strict=True):
        loss, weight = consistency_weighted_loss(reward, [d.float() for d in DISTANCES], 0.6, 0.1)
    exact = (WEIGHT * (0.6 - reward.double()).clamp(min=0)).mean().detach()
    assert loss.dtype == weight.dtype == torch.float32
    assert (loss - exact).abs() <= tolerances.reduction(exact, 3, torch.float32, operations=4) + 1e-7
    loss.backward()
    assert reward.grad.dtype == dtype


@by_backend
@pytest.mark.parametrize("count", [1, 3])
def test_more_samples_than_a_block_and_any_number_of_leaps(backend: str, count: int) -> None:
    reward, distances = torch.randn(300), torch.rand(count, 300)
    with use_backend(backend, strict=True):
        loss, weight = consistency_weighted_loss(reward, distances, 0.2, 0.3)
    expected = 1 / distances.double().clamp(min=0.3).sum(dim=0)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), (expected * (0.2 - reward.double()).relu()).mean(), rtol=1e-6, atol=0)


@by_backend
def test_a_broken_reward_or_distance_is_not_hidden(backend: str) -> None:
    broken = torch.tensor([torch.nan, 0.1])
    with use_backend(backend, strict=True):
        assert consistency_weighted_loss(broken, torch.ones(2), 0.5, 0.1)[0].isnan()
        loss, weight = consistency_weighted_loss(torch.zeros(2), broken, 0.5, 0.1)
    assert loss.isnan()
    assert weight.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("reward", "distances", "tau", "message"),
    [
        (torch.zeros(0), torch.zeros(0), 0.1, "B >= 1"),
        (torch.zeros(2, 2), torch.zeros(2), 0.1, r"shape \(B,\)"),
        (torch.zeros(2), torch.zeros(3), 0.1, "distances like the rewards"),
        (torch.zeros(2), [], 0.1, "at least one distance"),
        (torch.zeros(2), torch.zeros(2).int(), 0.1, "float32"),
        (torch.zeros(2), torch.zeros(2), -0.1, "tau >= 0"),
    ],
)
def test_wrong_arguments_are_named(reward, distances, tau, message) -> None:
    with pytest.raises(ValueError, match=message):
        consistency_weighted_loss(reward, distances, 0.5, tau)
