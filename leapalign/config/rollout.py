"""The section of the rollouts that training samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leapalign.inputs.bounds import Images, PositiveFloat, Steps

SigmaSpacing = Literal["pipeline", "linear"]
"""How noise levels lie before they are shifted."""


@dataclass(frozen=True)
class CacheConfig:
    """One of diffusers' caches."""

    name: Literal["first_block"]
    """What decides: the change of the first block's output."""
    threshold: PositiveFloat = 0.1
    """The largest change, relative to that output, at which the other blocks are left out."""


@dataclass(frozen=True)
class RolloutConfig:
    num_steps: Steps = 25
    """Euler steps from noise to image."""
    sigmas: SigmaSpacing = "pipeline"
    """Noise levels as the model's own pipeline has them, or evenly from 1 to ``1 / num_steps``, then shifted: of Stable
    Diffusion 3.5 others, its last of 25 is 0.111 instead of 0.009."""
    batch_size: Images = 32
    """Images sampled at once; an iteration of ``train.batch_size`` images runs as several such rollouts."""
    cache: CacheConfig | None = None
    """Leaves blocks out where a step resembles the one before, as ``{name: first_block, threshold: 0.1}`` says:
    training's rollouts are cheaper and differ; gradients and consistency weights are exact for where they went."""
