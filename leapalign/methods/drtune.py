"""DRTune (Wu et al., arXiv 2405.00760): a few equally spaced steps with detached inputs, and an early stop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.inputs.bounds import Steps
from leapalign.methods.base import SurrogateMethod, euler, last_steps, undiscounted, wide
from leapalign.rollout import Rollout
from leapalign.surrogate import SurrogatePlan


@dataclass(frozen=True)
class DRTune(SurrogateMethod):
    """Reward on the posterior mean at a late ``stop``; ``active_steps`` steps up to it carry gradient."""

    active_steps: Steps = 2
    """K: 2 in LeapAlign's comparison, 3 in FlowBP's."""
    last_steps: Steps = 11
    """The stop is one of the last so many steps."""

    def draw(self, num_steps: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``stop (B,)`` and ``active (K, B)``: steps ``n // K`` apart among the ``n`` up to the stop, the first at
        random; -1 in rows that ``n`` is too small for."""
        stop = last_steps(num_steps, self.last_steps, batch_size, generator)
        executed = stop + 1
        count = executed.clamp(max=self.active_steps)
        stride = executed // count
        room = executed - stride * (count - 1)
        first = (torch.rand(batch_size, generator=generator, dtype=torch.float64) * room).long()
        row = torch.arange(self.active_steps)[:, None]
        return {"stop": stop, "active": torch.where(row < count, first + stride * row, -1)}

    def plan(self, sigmas: Tensor, *, stop: Tensor, active: Tensor) -> SurrogatePlan:
        """Euler coefficients, but ``-sigma_stop`` for the stop itself: its velocity leads to the image."""
        return undiscounted(active, torch.where(active == stop, -wide(sigmas)[stop], euler(sigmas, active)))

    def reward_latents(self, rollout: Rollout, **indices: Tensor) -> Tensor:
        """The posterior means at the stop."""
        return rollout.posterior_mean(indices["stop"])
