"""ReFL (Xu et al., arXiv 2304.05977): one late step predicts the image, and only its velocity carries gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.inputs.bounds import PositiveInt
from leapalign.methods.base import undiscounted, wide
from leapalign.methods.draws import StepDraws
from leapalign.rollout import Rollout
from leapalign.surrogate import SurrogatePlan


@dataclass(frozen=True)
class ReFL(StepDraws):
    """Reward on the posterior mean ``x_i - sigma_i v_i`` of a step drawn late in the trajectory."""

    last_steps: PositiveInt = 11
    """The step is one of the last so many; 11 of 25 in the comparisons of LeapAlign and FlowBP."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_beside_a_range("last_steps")

    def own_range(self, num_steps: int) -> range:
        """The last steps (all, where there are fewer)."""
        return range(max(0, num_steps - self.last_steps), num_steps)

    def draw_steps(self, window: range, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``i (B,)``, uniform."""
        return {"i": torch.randint(window.start, window.stop, (batch_size,), generator=generator)}

    def plan(self, sigmas: Tensor, *, i: Tensor) -> SurrogatePlan:
        """One row, coefficient ``-sigma_i``."""
        return undiscounted(i[None], -wide(sigmas)[i][None])

    def reward_latents(self, rollout: Rollout, **indices: Tensor) -> Tensor:
        """The posterior means at ``i``."""
        return rollout.posterior_mean(indices["i"])
