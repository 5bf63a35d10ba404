"""DRTune (Wu et al., arXiv 2405.00760): a few equally spaced steps with detached inputs, and an early stop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.inputs.bounds import Steps
from leapalign.methods.base import euler, undiscounted, wide
from leapalign.methods.draws import StepDraws
from leapalign.rollout import Rollout
from leapalign.surrogate import SurrogatePlan


@dataclass(frozen=True)
class DRTune(StepDraws):
    """Reward on the posterior mean at a late ``stop``; ``active_steps`` steps up to it carry gradient."""

    active_steps: Steps = 2
    """K: 2 in LeapAlign's comparison, 3 in FlowBP's."""
    last_steps: Steps = 11
    """The stop is one of the last so many steps that may carry gradient."""

    def draw_steps(self, window: range, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``stop (B,)`` and ``active (K, B)``: steps ``n // K`` apart among the ``n`` up to the stop, the first at
        random; -1 in rows that ``n`` is too small for."""
        earliest = max(window.start, window.stop - self.last_steps)
        stop = torch.randint(earliest, window.stop, (batch_size,), generator=generator)
        executed = stop + 1 - window.start
        count = executed.clamp(max=self.active_steps)
        stride = executed // count
        room = executed - stride * (count - 1)
        first = (torch.rand(batch_size, generator=generator, dtype=torch.float64) * room).long()
        row = torch.arange(self.active_steps)[:, None]
        return {"stop": stop, "active": torch.where(row < count, window.start + first + stride * row, -1)}

    def plan(self, sigmas: Tensor, *, stop: Tensor, active: Tensor) -> SurrogatePlan:
        """Euler coefficients, but ``-sigma_stop`` for the stop itself: its velocity leads to the image."""
        return undiscounted(active, torch.where(active == stop, -wide(sigmas)[stop], euler(sigmas, active)))

    def reward_latents(self, rollout: Rollout, **indices: Tensor) -> Tensor:
        """The posterior means at the stop."""
        return rollout.posterior_mean(indices["stop"])
