"""FlowBP-Sparse (arXiv 2606.11075): a few steps of the sampler, later ones more often, all inputs detached."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.inputs.bounds import NonNegativeFloat, Steps
from leapalign.methods.active_set import draw_without_replacement, length, rescaled
from leapalign.methods.base import euler, undiscounted
from leapalign.methods.draws import StepDraws
from leapalign.surrogate import SurrogatePlan


@dataclass(frozen=True)
class FlowBPSparse(StepDraws):
    """``active_steps`` Euler steps, drawn without replacement."""

    active_steps: Steps = 3
    """K of the paper."""
    late_bias: NonNegativeFloat = 2.0
    """Step i is drawn with weight ``(i + 1) ** late_bias``; 0: all alike."""
    rescale: NonNegativeFloat = 1.0
    """rho of the paper: how far coefficients grow to make up for the steps left out."""

    def draw_steps(self, window: range, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``active (K, B)``, ascending."""
        weight = torch.arange(window.start + 1, window.stop + 1).double().pow(self.late_bias).expand(batch_size, -1)
        count = torch.full((batch_size,), min(self.active_steps, len(window)))
        return {"active": window.start + draw_without_replacement(weight, count, generator)}

    def plan(self, sigmas: Tensor, *, active: Tensor) -> SurrogatePlan:
        """Euler coefficients, rescaled against those of all steps that may carry gradient."""
        total = length(sigmas, self.window(len(sigmas) - 1))
        return undiscounted(active, rescaled(euler(sigmas, active), total, self.rescale))
