"""LeapAlign (arXiv 2604.15311): two leaps cut out of the trajectory, weighted by their agreement with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from leap_kernels import consistency_weighted_loss, leap_distances
from torch import Tensor

from leapalign.rollout import Rollout
from leapalign.surrogate import SurrogatePlan


@dataclass(frozen=True)
class LeapAlign:
    """``x_k -leap-> x_j -leap-> image`` with ``k < j`` drawn per image.

    alpha: discount of the nested gradient term (LA 9-10): 0.3 with HPSv2.1, 0.1 with PickScore and HPSv3.
    tau: floor of each distance in the consistency weight (LA 12-13).

    Raises ValueError for a negative alpha or a tau that is not positive.
    """

    alpha: float = 0.3
    tau: float = 0.1

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, got {self.tau}")

    def draw(self, num_steps: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``k < j``, each ``(B,)`` int64: two distinct steps, uniform over the whole trajectory."""
        if num_steps < 2:
            raise ValueError(f"two leaps need at least 2 sampling steps, got {num_steps}")
        order = torch.rand(batch_size, num_steps, generator=generator).argsort(dim=1)
        k, j = order[:, :2].sort(dim=1).values.unbind(dim=1)
        return {"k": k, "j": j}

    def plan(self, sigmas: Tensor, *, k: Tensor, j: Tensor) -> SurrogatePlan:
        """Rows ``k`` and ``j``: coefficients ``-(sigma_k - sigma_j)`` and ``-sigma_j``, bridge at ``j``."""
        sigmas = sigmas.to(torch.promote_types(sigmas.dtype, torch.float32)).cpu()
        return SurrogatePlan(
            index=torch.stack([k, j]),
            coefficient=torch.stack([sigmas[j] - sigmas[k], -sigmas[j]]),
            discount=torch.tensor([0.0, self.alpha], dtype=sigmas.dtype),
        )

    def loss(
        self, reward: Tensor, threshold: float, rollout: Rollout, *, k: Tensor, j: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``mean_b w_b max(0, threshold - r_b)`` (LA 11-13), with ``d_j``, ``d_end`` and ``w`` per sample."""
        samples = torch.arange(len(k))
        distance_j, distance_end = leap_distances(
            rollout.latents[k, samples],
            rollout.velocities[k, samples],
            rollout.latents[j, samples],
            rollout.velocities[j, samples],
            rollout.latents[-1],
            rollout.sigmas[k].to(reward.device),
            rollout.sigmas[j].to(reward.device),
        )
        loss, weight = consistency_weighted_loss(reward, (distance_j, distance_end), threshold, self.tau)
        return loss, {"d_j": distance_j, "d_end": distance_end, "w": weight}
