"""DRaFT-K (Clark et al., arXiv 2309.17400): exact backpropagation through the last K steps of the sampler.

All T steps are AlignProp (Prabhudesai et al., arXiv 2310.03739), and the true gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.inputs.bounds import Steps
from leapalign.methods.base import euler
from leapalign.methods.draws import StepDraws
from leapalign.surrogate import SurrogatePlan


@dataclass(frozen=True)
class DRaFTK(StepDraws):
    """Euler coefficients and discount 1 on the last ``steps`` steps."""

    steps: Steps | None = 1
    """K; null: all steps of the sampler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_beside_a_range("steps")

    def own_range(self, num_steps: int) -> range:
        """The last K steps (all, where there are fewer)."""
        return range(max(0, num_steps - (self.steps or num_steps)), num_steps)

    def window(self, num_steps: int) -> range:
        """As of other methods; raises ValueError where it stops before the image, too."""
        window = super().window(num_steps)
        if window.stop < num_steps:
            raise ValueError(
                f"draft_k goes back from the image, so index_range has to end with the last step, {num_steps - 1}"
            )
        return window

    def draw_steps(self, window: range, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``first (B,)``, the first step with gradient: nothing is random here."""
        return {"first": torch.full((batch_size,), window.start)}

    def plan(self, sigmas: Tensor, *, first: Tensor) -> SurrogatePlan:
        """Rows ``first .. T - 1``. Raises ValueError where ``first`` differs between samples."""
        if bool((first != first[0]).any()):
            raise ValueError("draft_k goes back equally far for every sample: all entries of 'first' must be equal")
        index = torch.arange(int(first[0]), len(sigmas) - 1)[:, None].expand(-1, len(first))
        coefficient = euler(sigmas, index)
        return SurrogatePlan(index, coefficient, torch.ones(len(index), dtype=coefficient.dtype))
