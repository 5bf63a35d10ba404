from __future__ import annotations

import pytest
import torch
from device_copies import AWAY, DeviceCopies

from leapalign.rollout import Rollout, sample_rollout

SIGMAS = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)


def test_straight_flow_is_integrated_exactly() -> None:
    """With data fixed, ``v = noise - data`` is constant along the path: Euler steps and leaps are exact."""
    noise, data = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    rollout = sample_rollout(lambda x, sigma: noise - data, noise, SIGMAS)
    for step, sigma in enumerate(SIGMAS):
        torch.testing.assert_close(rollout.latents[step], sigma * noise + (1 - sigma) * data)
    for step in range(rollout.num_steps):
        torch.testing.assert_close(rollout.posterior_mean(step), data)


def test_each_step_is_euler_and_keeps_its_velocity() -> None:
    rollout = sample_rollout(lambda x, sigma: x.sin() * sigma[:, None], torch.randn(3, 5, dtype=torch.float64), SIGMAS)
    for t in range(4):
        velocity = rollout.latents[t].sin() * SIGMAS[t]
        torch.testing.assert_close(rollout.velocities[t], velocity)
        torch.testing.assert_close(rollout.latents[t + 1], rollout.latents[t] + (SIGMAS[t + 1] - SIGMAS[t]) * velocity)


def test_posterior_mean_takes_a_step_per_sample() -> None:
    rollout = sample_rollout(lambda x, sigma: x.sin(), torch.randn(3, 5, dtype=torch.float64), SIGMAS)
    mixed = rollout.posterior_mean(torch.tensor([0, 2, 3]))
    for sample, step in enumerate((0, 2, 3)):
        torch.testing.assert_close(mixed[sample], rollout.posterior_mean(step)[sample])


def test_rollout_keeps_no_graph() -> None:
    weight = torch.ones(5, requires_grad=True)
    rollout = sample_rollout(lambda x, sigma: weight * x, torch.randn(3, 5), SIGMAS.float())
    assert not rollout.latents.requires_grad
    assert not rollout.velocities.requires_grad


@pytest.mark.parametrize(
    ("latents", "velocities", "sigmas", "message"),
    [
        ((5, 2, 3), (5, 2, 3), SIGMAS, "T\\+1 latents"),
        ((5, 2, 3), (4, 2, 4), SIGMAS, "T\\+1 latents"),
        ((5, 2, 3), (4, 2, 3), SIGMAS[:-1], "shape \\(5,\\)"),
        ((5, 2, 3), (4, 2, 3), SIGMAS.flip(0), "descend"),
        ((5, 2, 3), (4, 2, 3), SIGMAS + 0.1, "end at 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    latents: tuple[int, ...], velocities: tuple[int, ...], sigmas: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Rollout(torch.zeros(latents), torch.zeros(velocities), sigmas)


def test_levels_go_to_the_device_once() -> None:
    """Latents on another device than the host: of all operations, one copies from the host."""
    with DeviceCopies() as counted:
        rollout = sample_rollout(lambda x, sigma: x * sigma[:, None], torch.empty(3, 5, device=AWAY), SIGMAS)
    assert rollout.latents.device == AWAY
    assert counted.all == {"rollout.py:sample_rollout": 1}


def test_entries_are_picked_without_a_copy() -> None:
    noise, steps = torch.randn(2, 5, dtype=torch.float64), torch.tensor([3, 0, 2, 2])
    here = sample_rollout(lambda x, sigma: x.sin(), noise, SIGMAS)
    samples = torch.tensor([0, 1, 0, 1])
    assert torch.equal(here.latents_at(steps), here.latents[steps, samples])
    assert torch.equal(here.velocities_at(steps), here.velocities[steps, samples])
    away = Rollout(here.latents.to(AWAY), here.velocities.to(AWAY), SIGMAS)
    with DeviceCopies() as counted:
        for found in (away.latents_at(steps), away.velocities_at(steps), away.posterior_mean(steps)):
            assert found.shape == (4, 5)
            assert found.device == AWAY
    assert not counted.all
