"""The sections of what a run shows and measures beside training: they change no weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from leapalign.inputs.bounds import Images, NonNegativeFloat, NonNegativeInt, Steps
from leapalign.inputs.paths import PathText


@dataclass(frozen=True)
class DiagnosticsConfig:
    true_gradient_every: NonNegativeInt = 0
    """Iterations between comparisons with exact backpropagation through the whole sampler (as slow as T steps, and
    two more copies of the gradient); 0: never."""


@dataclass(frozen=True)
class SamplesConfig:
    every: NonNegativeInt = 50
    """Iterations between sample grids (same prompts and seeds every time), the first before training and one after
    the last iteration; 0: none."""
    count: Images = 24
    """Images in a grid."""


@dataclass(frozen=True)
class EvaluateConfig:
    rewards: tuple[dict[str, Any], ...] = ()
    """What ``leapalign evaluate`` scores with, each with its ``name`` and own options; empty: what is trained on."""
    num_steps: Steps | None = None
    """Euler steps of the images that ``leapalign evaluate`` and ``generate`` make; null: ``rollout.num_steps``."""
    guidance: NonNegativeFloat | None = None
    """Their guidance scale: ``model.guidance`` where the model takes it as an input (FLUX.1-dev, FLUX.2-dev), else
    ``model.true_cfg_scale``; null: the model's. Training, sample grids, watch and probe keep the rollout's."""


@dataclass(frozen=True)
class WatchConfig:
    every: NonNegativeInt = 0
    """Iterations between measurements on held-out prompts, see docs/watch.md; 0: never."""
    prompts: PathText | None = None
    """File of the held-out prompts, such as ``prompts.path`` takes."""
    seeds: Annotated[int, Field(ge=2)] = 2
    """Images of each held-out prompt."""
    rewards: tuple[dict[str, Any], ...] = ()
    """Scored beside what is trained on, each with its ``name`` and own options."""
    stop_when: tuple[str, ...] = ()
    """Rules that end the run, such as ``diversity < 0.5 base``, ``held_out_imagereward < base - 0.2`` or
    ``saturation > 0.2``; ``base`` is the value before training."""

    @property
    def best_by(self) -> str:
        """The metric that is highest at the best checkpoint: of a reward not trained on, where there is one."""
        return f"held_out_{self.rewards[0]['name']}" if self.rewards else "held_out_reward"
