"""FlowBP-Bridge (arXiv 2606.11075): active steps on both sides of a step j, whose input lets gradient through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from leapalign.inputs.bounds import NonNegativeFloat
from leapalign.methods.active_set import draw_without_replacement, length, rescaled
from leapalign.methods.base import euler
from leapalign.methods.draws import StepDraws
from leapalign.methods.leap_draws import uniform_starts
from leapalign.surrogate import SurrogatePlan


@dataclass(frozen=True)
class FlowBPBridge(StepDraws):
    """``active_steps`` Euler steps, shared out by the lengths of the two sides, at least one each; j always is one."""

    active_steps: Annotated[int, Field(ge=2, le=1000)] = 5
    """K of the paper."""
    alpha: NonNegativeFloat = 0.1
    """Discount at j."""
    late_bias: NonNegativeFloat = 2.0
    """The n-th step of a side is drawn with weight ``n ** late_bias``; 0: all alike."""
    rescale: NonNegativeFloat = 1.0
    """rho of the paper: how far coefficients grow to make up for the steps left out."""

    def draw_steps(self, window: range, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``j (B,)``, the later of two distinct steps; ``before (K - 1, B)`` and ``after (K - 2, B)``, the other
        active steps, ascending and filled up with -1. Raises ValueError for a window of one step."""
        # All counted from the window's first step.
        j = uniform_starts(len(window), 2, batch_size, generator)[1]
        total = min(self.active_steps, len(window))
        before = (total * j / len(window)).round().long().clamp(1, total - 1)
        before = torch.minimum(before, j)
        after = torch.minimum(total - before, len(window) - j)
        before = total - after
        step, at = torch.arange(len(window)), j[:, None]
        early = (step + 1.0).where(step < at, 0).double().pow(self.late_bias) * (step < at)
        late = (step - at).clamp(min=0).double().pow(self.late_bias) * (step > at)
        return {
            "j": window.start + j,
            "before": _filled(draw_without_replacement(early, before, generator), self.active_steps - 1, window.start),
            "after": _filled(draw_without_replacement(late, after - 1, generator), self.active_steps - 2, window.start),
        }

    def plan(self, sigmas: Tensor, *, j: Tensor, before: Tensor, after: Tensor) -> SurrogatePlan:
        """Euler coefficients, rescaled against those of all steps that may carry gradient; discount alpha at j."""
        index = torch.cat([before, j[None], after])
        coefficient = rescaled(euler(sigmas, index), length(sigmas, self.window(len(sigmas) - 1)), self.rescale)
        discount = torch.zeros(len(index), dtype=coefficient.dtype)
        discount[len(before)] = self.alpha
        return SurrogatePlan(index.clamp(min=0), coefficient, discount)


def _filled(steps: Tensor, rows: int, first: int) -> Tensor:
    """``steps`` counted from ``first`` on as steps of the trajectory, with more rows of -1."""
    placed = (first + steps).where(steps >= 0, -1)
    return torch.cat([placed, torch.full((rows - len(steps), steps.shape[1]), -1)])
