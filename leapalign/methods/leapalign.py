"""LeapAlign (arXiv 2604.15311): leaps cut out of the trajectory, weighted by their agreement with it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from leap_kernels import consistency_weighted_loss, leap_distances
from torch import Tensor

from leapalign.inputs.bounds import NonNegativeFloat, PositiveFloat, PositiveInt
from leapalign.methods.base import wide
from leapalign.methods.draws import StepDraws
from leapalign.methods.leap_draws import STRATEGIES
from leapalign.rollout import Rollout
from leapalign.surrogate import SurrogatePlan

STARTS = ("k", "j", "m")
"""Names of the steps that the first, second and third leap start from."""
WEIGHED = {"all": slice(None), "connectors": slice(0, -1), "end": slice(-1, None), "none": slice(0, 0)}


@dataclass(frozen=True)
class LeapAlign(StepDraws):
    """``x_k -leap-> x_j -leap-> image`` with ``k < j`` drawn per image (and a third leap from ``m``, or one only).

    Raises ValueError for options that do not go together.
    """

    alpha: NonNegativeFloat = 0.3
    """Discount of the nested gradient terms (LA 9-10): 0.3 with HPSv2.1, 0.1 with PickScore and HPSv3."""
    tau: PositiveFloat = 0.1
    """Floor of each distance in the consistency weight (LA 12-13)."""
    leaps: Literal[1, 2, 3] = 2
    """Two in the paper; its ablation finds one worse and three no better."""
    max_ratio: NonNegativeFloat | None = None
    """Discounts shrink, image by image, until nested terms are at most so many times the direct; null: the paper."""
    draws: Literal["uniform", "fixed_gap", "midpoint", "dirichlet"] = "uniform"
    """How starts are drawn, see `leapalign.methods.leap_draws`; uniform in the paper."""
    gap: PositiveInt = 5
    """Steps between starts, for ``fixed_gap``."""
    concentration: tuple[PositiveFloat, ...] = (2.0, 6.0, 2.5)
    """Of the parts before, between and after the starts, for ``dirichlet``; FlowBP's values."""
    weigh_by: Literal["all", "connectors", "end", "none"] = "all"
    """Distances in the consistency weight: to all targets (the paper), the connectors' only, the image only, none."""
    reward_on: Literal["image", "posterior_mean"] = "image"
    """The generated image (the paper), or what the last leap predicts of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leaps == 1 and self.weigh_by == "connectors":
            raise ValueError("one leap has no connector to weigh by; set weigh_by to 'end' or leaps to 2")

    def draw_steps(self, window: range, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``k < j`` (or ``k``, or ``k < j < m``), each ``(B,)`` int64. Raises ValueError where the steps do not
        suffice."""
        starts = window.start + STRATEGIES[self.draws](self, len(window), batch_size, generator)
        return dict(zip(STARTS, starts, strict=False))

    def plan(self, sigmas: Tensor, *, k: Tensor, j: Tensor | None = None, m: Tensor | None = None) -> SurrogatePlan:
        """A row a leap: coefficient ``-(sigma_from - sigma_to)``, ``-sigma`` for the last; alpha but for the first."""
        index = torch.stack([start for start in (k, j, m) if start is not None])
        level = wide(sigmas)[index]
        return SurrogatePlan(
            index=index,
            coefficient=torch.cat([level[1:], torch.zeros_like(level[:1])]) - level,
            discount=torch.tensor([0.0] + [self.alpha] * (len(index) - 1), dtype=level.dtype),
            max_ratio=self.max_ratio,
        )

    def reward_latents(self, rollout: Rollout, **indices: Tensor) -> Tensor:
        """The generated latents ``(B, ...)``, or the posterior means ``(N, ...)`` at the last start."""
        if self.reward_on == "image":
            return rollout.latents[-1]
        return rollout.posterior_mean(indices[STARTS[len(indices) - 1]])

    def loss(
        self, reward: Tensor, threshold: float, rollout: Rollout, **indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``mean_n w_n max(0, threshold - r_n)`` (LA 11-13), with distances ``d_j``, ``d_end`` and ``w`` per column."""
        distances = _distances(rollout, list(indices.values()), reward.device)
        seen = {f"d_{name}": d for name, d in zip([*list(indices)[1:], "end"], distances, strict=True)}
        weighed = distances[WEIGHED[self.weigh_by]]
        if not weighed:
            return super().loss(reward, threshold, rollout)[0], seen
        loss, weight = consistency_weighted_loss(reward, weighed, threshold, self.tau)
        return loss, {**seen, "w": weight}


def _distances(rollout: Rollout, starts: list[Tensor], device: torch.device) -> list[Tensor]:
    """How far each leap lands from where the rollout went, ``(N,)`` each: from start to start, and to the image."""
    end = rollout.latents[-1, torch.arange(len(starts[0])) % rollout.batch_size]
    # A single leap goes as a pair whose first leap stays where it is.
    pairs = list(itertools.pairwise(starts)) or [(starts[0], starts[0])]
    found = [
        leap_distances(
            rollout.latents_at(one),
            rollout.velocities_at(one),
            rollout.latents_at(other),
            rollout.velocities_at(other),
            end,
            rollout.sigmas[one].to(device),
            rollout.sigmas[other].to(device),
        )
        for one, other in pairs
    ]
    return [*(to_start for to_start, _ in found[: len(starts) - 1]), found[-1][1]]
