"""DRaFT-LV (Clark et al., arXiv 2309.17400): the last step, averaged over several noises to lower the variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from leapalign.methods.base import undiscounted, wide
from leapalign.methods.draws import StepDraws
from leapalign.rollout import Rollout, sample_rollout
from leapalign.surrogate import ConditionedVelocity, SurrogatePlan


@dataclass(frozen=True)
class DRaFTLV(StepDraws):
    """Gradient through the last step of the rollout and of ``copies`` re-noised ones, each rewarded by itself.

    A copy is the generated latent with fresh noise, ``(1 - sigma) x_T + sigma noise`` at the last step's sigma. All
    images have the same step and each its own noise, whatever ``per_image`` says.
    """

    copies: Annotated[int, Field(ge=0, le=1000)] = 2
    """n of the paper."""

    def draw(self, num_steps: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``noise_seed (copies, B)``. Raises ValueError where the last step may not carry gradient."""
        if num_steps - 1 not in self.window(num_steps):
            raise ValueError(f"draft_lv differentiates the last step; let index_range end with it, {num_steps - 1}")
        return {"noise_seed": torch.randint(2**62, (self.copies, batch_size), generator=generator)}

    def trajectory(self, rollout: Rollout, velocity: ConditionedVelocity, **indices: Tensor) -> Rollout:
        """The last step alone, for ``(1 + copies) N`` columns: the rollout's own, then copy after copy."""
        seeds = indices["noise_seed"]
        samples = torch.arange(seeds.shape[1]) % rollout.batch_size
        sigma, end = rollout.sigmas[-2], rollout.latents[-1, samples]
        starts = [rollout.latents[-2, samples]]
        for seed in seeds:
            noise = torch.stack([_noise(int(one), end) for one in seed])
            starts.append((1 - sigma.to(end)) * end + sigma.to(end) * noise)
        columns = samples.repeat(1 + len(seeds))
        return sample_rollout(velocity.select(columns), torch.cat(starts), rollout.sigmas[-2:])

    def plan(self, sigmas: Tensor, *, noise_seed: Tensor) -> SurrogatePlan:
        """The last step, coefficient ``-sigma_{T-1}``, for ``(1 + copies) N`` columns."""
        columns = (1 + len(noise_seed)) * noise_seed.shape[1]
        index = torch.full((1, columns), len(sigmas) - 2)
        return undiscounted(index, -wide(sigmas)[index])


def _noise(seed: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed)).to(like)
