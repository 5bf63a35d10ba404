"""What methods have in common: they reward the generated image by an unweighted hinge loss, unless they override it."""

from __future__ import annotations

import torch
from torch import Tensor

from leapalign.rollout import Rollout
from leapalign.surrogate import ConditionedVelocity, SurrogatePlan


class SurrogateMethod:
    """Base of methods. One adds ``draw`` and ``plan``, see `leapalign.methods.Method`, and overrides what differs."""

    def trajectory(self, rollout: Rollout, velocity: ConditionedVelocity, **indices: Tensor) -> Rollout:
        """The trajectory that the plan is for, columns of samples in turn: here the ``rollout`` itself."""
        return rollout

    def reward_latents(self, rollout: Rollout, **indices: Tensor) -> Tensor:
        """What is decoded and rewarded: here the generated latents, ``(B, ...)``."""
        return rollout.latents[-1]

    def loss(
        self, reward: Tensor, threshold: float, rollout: Rollout, **indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``mean_n max(0, threshold - r_n)`` of ``reward (N,)``, without diagnostics."""
        return (threshold - reward).relu().mean(), {}


def wide(sigmas: Tensor) -> Tensor:
    """``sigmas`` on the CPU, in float32 or wider: what plans are made from."""
    return sigmas.to(torch.promote_types(sigmas.dtype, torch.float32)).cpu()


def euler(sigmas: Tensor, index: Tensor) -> Tensor:
    """Coefficients of Euler steps, ``sigma_{i+1} - sigma_i`` for ``index`` of any shape; 0 where it is negative."""
    return wide(sigmas).diff()[index.clamp(min=0)] * (index >= 0)


def undiscounted(index: Tensor, coefficient: Tensor) -> SurrogatePlan:
    """A plan whose rows all have detached inputs; a negative ``index`` takes no part."""
    return SurrogatePlan(index.clamp(min=0), coefficient, torch.zeros(len(index), dtype=coefficient.dtype))
