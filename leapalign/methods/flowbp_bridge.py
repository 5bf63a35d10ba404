"""FlowBP-Bridge (arXiv 2606.11075): active steps on both sides of a step j, whose input lets gradient through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from leapalign.inputs.bounds import NonNegativeFloat
from leapalign.methods.active_set import draw_without_replacement, rescaled
from leapalign.methods.base import SurrogateMethod, euler, wide
from leapalign.methods.leap_draws import uniform_starts
from leapalign.surrogate import SurrogatePlan


@dataclass(frozen=True)
class FlowBPBridge(SurrogateMethod):
    """``active_steps`` Euler steps, shared out by the lengths of the two sides, at least one each; j always is one."""

    active_steps: Annotated[int, Field(ge=2, le=1000)] = 5
    """K of the paper."""
    alpha: NonNegativeFloat = 0.1
    """Discount at j."""
    late_bias: NonNegativeFloat = 2.0
    """The n-th step of a side is drawn with weight ``n ** late_bias``; 0: all alike."""
    rescale: NonNegativeFloat = 1.0
    """rho of the paper: how far coefficients grow to make up for the steps left out."""

    def draw(self, num_steps: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``j (B,)``, the later of two distinct steps; ``before (K - 1, B)`` and ``after (K - 2, B)``, the other
        active steps, ascending and filled up with -1. Raises ValueError for a single sampling step."""
        j = uniform_starts(num_steps, 2, batch_size, generator)[1]
        total = min(self.active_steps, num_steps)
        before = (total * j / num_steps).round().long().clamp(1, total - 1)
        before = torch.minimum(before, j)
        after = torch.minimum(total - before, num_steps - j)
        before = total - after
        step, at = torch.arange(num_steps), j[:, None]
        early = (step + 1.0).where(step < at, 0).double().pow(self.late_bias) * (step < at)
        late = (step - at).clamp(min=0).double().pow(self.late_bias) * (step > at)
        return {
            "j": j,
            "before": _filled(draw_without_replacement(early, before, generator), self.active_steps - 1),
            "after": _filled(draw_without_replacement(late, after - 1, generator), self.active_steps - 2),
        }

    def plan(self, sigmas: Tensor, *, j: Tensor, before: Tensor, after: Tensor) -> SurrogatePlan:
        """Euler coefficients, rescaled against those of all steps; discount alpha at j."""
        index = torch.cat([before, j[None], after])
        coefficient = rescaled(euler(sigmas, index), wide(sigmas).diff().abs().sum(), self.rescale)
        discount = torch.zeros(len(index), dtype=coefficient.dtype)
        discount[len(before)] = self.alpha
        return SurrogatePlan(index.clamp(min=0), coefficient, discount)


def _filled(steps: Tensor, rows: int) -> Tensor:
    return torch.cat([steps, torch.full((rows - len(steps), steps.shape[1]), -1)])
