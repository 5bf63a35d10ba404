"""FlowBP-Lagrange (arXiv 2606.11075): two leaps, each integrating a polynomial through several of its velocities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from leap_kernels import consistency_weighted_loss
from numpy.polynomial import Polynomial
from pydantic import Field
from torch import Tensor

from leapalign.inputs.bounds import NonNegativeFloat, PositiveFloat, Steps
from leapalign.methods.active_set import rescaled
from leapalign.methods.base import wide
from leapalign.methods.draws import StepDraws
from leapalign.methods.leap_draws import dirichlet_starts
from leapalign.rollout import Rollout, per_sample
from leapalign.surrogate import SurrogatePlan


@dataclass(frozen=True)
class FlowBPLagrange(StepDraws):
    """LeapAlign whose leaps interpolate the velocities at nearly even ``supports``, of which the first carry gradient.

    A leap from a to b is ``x_a + sum_i c_i v_i`` with ``c_i`` the integral of the i-th Lagrange basis polynomial of
    sigma from ``sigma_a`` to ``sigma_b``; a leap of fewer steps than supports takes every step.
    """

    supports: Steps = 3
    """Velocities in a leap."""
    active_supports: Steps = 2
    """How many of them carry gradient, from the start on."""
    support_scale: NonNegativeFloat = 0.25
    """Factor on the gradient of those after the start."""
    rescale: NonNegativeFloat = 0.5
    """rho of the paper: how far coefficients grow to make up for the supports without gradient."""
    alpha: NonNegativeFloat = 0.1
    """Discount at j."""
    tau: PositiveFloat = 0.2
    """Floor of each distance in the consistency weight."""
    concentration: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (2.0, 6.0, 2.5)
    """Dirichlet split of the steps into those up to k, from there up to j, and after j."""
    longest_last_leap: Annotated[int, Field(ge=2, le=1000)] | None = None
    """Most steps that the last leap may have: an earlier j moves there, and k by as many steps; null: any (FlowBP)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest_last_leap is not None and self.index_range is not None:
            raise ValueError("longest_last_leap and index_range both bound where the last leap starts; leave one out")

    def draw_steps(self, window: range, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``k < j``, each ``(B,)`` int64, at least two steps before the end where the window has three."""
        k, j = window.start + dirichlet_starts(self.concentration, len(window), batch_size, generator)
        if self.longest_last_leap is not None:
            late = (window.stop - self.longest_last_leap - j).clamp(min=0)
            k, j = k + late, j + late
        return {"k": k, "j": j}

    def plan(self, sigmas: Tensor, *, k: Tensor, j: Tensor) -> SurrogatePlan:
        """The active supports of both leaps, discount alpha at j; a short leap's spare rows take no part."""
        level = wide(sigmas)
        leaps = [self._leap(level, k, j), self._leap(level, j, torch.full_like(j, len(level) - 1))]
        index = torch.cat([step[: self.active_supports] for step, _ in leaps])
        stop = self.window(len(level) - 1).stop
        coefficient = torch.cat([self._active(weight, step < stop) for step, weight in leaps])
        discount = torch.zeros(len(index), dtype=level.dtype)
        discount[len(leaps[0][0][: self.active_supports])] = self.alpha
        return SurrogatePlan(index, coefficient, discount)

    def loss(
        self, reward: Tensor, threshold: float, rollout: Rollout, **indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``mean_n w_n max(0, threshold - r_n)`` (LA 11-13) with the distances of these leaps."""
        k, j = indices["k"], indices["j"]
        end = torch.full_like(j, rollout.num_steps)
        distance_j = self._distance(rollout, k, j)
        distance_end = self._distance(rollout, j, end)
        loss, weight = consistency_weighted_loss(reward, (distance_j, distance_end), threshold, self.tau)
        return loss, {"d_j": distance_j, "d_end": distance_end, "w": weight}

    def _active(self, weight: Tensor, allowed: Tensor) -> Tensor:
        """Coefficients ``(active_supports, N)`` from a leap's weights and where it may carry gradient, ``(supports,
        N)``."""
        active = (weight * allowed)[: self.active_supports]
        active = rescaled(active, weight.abs().sum(dim=0), self.rescale)
        return torch.cat([active[:1], self.support_scale * active[1:]])

    def _distance(self, rollout: Rollout, start: Tensor, end: Tensor) -> Tensor:
        """``mean |x_end - xhat_end|`` of each leap, ``(N,)`` float32."""
        steps, weights = self._leap(wide(rollout.sigmas), start, end)
        leapt = rollout.latents_at(start).float()
        for step, weight in zip(steps, weights, strict=True):
            leapt = leapt + per_sample(weight.to(leapt.device), leapt) * rollout.velocities_at(step)
        return (rollout.latents_at(end) - leapt).abs().flatten(1).mean(dim=1)

    def _leap(self, level: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Supports and their weights, both ``(supports, N)``; spare ones have weight 0."""
        steps = start.repeat(self.supports, 1)
        weights = torch.zeros(steps.shape, dtype=level.dtype)
        for column, (a, b) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
            count = min(self.supports, b - a)
            supports = [a + round(i * (b - 1 - a) / max(1, count - 1)) for i in range(count)]
            steps[:count, column] = torch.tensor(supports)
            weights[:count, column] = _lagrange(level[supports].double(), float(level[a]), float(level[b]))
        return steps, weights


def _lagrange(points: Tensor, start: float, end: float) -> Tensor:
    """Integral from ``start`` to ``end`` of each Lagrange basis polynomial of ``points (n,)``."""
    nodes = points.tolist()
    integrals = []
    for i, node in enumerate(nodes):
        others = nodes[:i] + nodes[i + 1 :]
        basis = Polynomial.fromroots(others) if others else Polynomial([1.0])
        primitive = (basis / basis(node)).integ()
        integrals.append(primitive(end) - primitive(start))
    return torch.tensor(integrals, dtype=torch.float64)
