"""Samples with numbers that are not finite: found, kept out of the gradient, and named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leapalign.reward_gradient import RewardGradient
from leapalign.rollout import Rollout


def drop_rollouts(rollout: Rollout) -> Tensor:
    """Sets samples of ``rollout`` that did not stay finite to zero, in place; returns which those are, ``(B,)`` bool.

    The last latents tell: each latent is the one before plus a multiple of its velocity, and nothing finite comes of
    what is not.
    """
    broken = _not_finite(rollout.latents[-1])
    for values in (rollout.latents, rollout.velocities):
        values.masked_fill_(broken.view(1, -1, *[1] * (values.dim() - 2)), 0)
    return broken


def first_fault(broken: Tensor, scored: Sequence[RewardGradient]) -> Tensor:
    """Of each rewarded latent the number of what was not finite first, ``(N,)`` int64; 0: nothing was.

    broken: ``(B,)``, which rollouts are not; latent n is of sample ``n % B``. `fault_names` are the numbers' names.
    """
    latents = torch.arange(len(scored[0].rewards), device=broken.device)
    fault = broken[latents % len(broken)].long()
    for number, one in enumerate(scored):
        for offset, values in enumerate((one.rewards.view(-1, 1), one.gradient)):
            fault = torch.where(fault == 0, (2 + 2 * number + offset) * _not_finite(values), fault)
    return fault


def fault_names(rewards: Sequence[str]) -> list[str]:
    """What the numbers of `first_fault` stand for, with the ``rewards`` by name."""
    return ["nothing", "latents", *(f"{what} {name}" for name in rewards for what in ("reward", "gradient of reward"))]


def _not_finite(values: Tensor) -> Tensor:
    """Which of ``(N, ...)`` samples, ``(N,)`` bool."""
    return ~values.flatten(1).isfinite().all(dim=1)
