"""Backbone families behind one protocol: prompt embeddings and latents in, velocity out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from leapalign.config import ModelConfig
from leapalign.embedded import resolve
from leapalign.models import flux
from leapalign.rollout import VelocityFn

E = TypeVar("E", contravariant=True)


class FlowModel(Protocol[E]):
    """One flow-matching model at one resolution; ``E`` is its kind of prompt embeddings (indexable by sample)."""

    @property
    def transformer(self) -> torch.nn.Module:
        """The network that is trained."""
        ...

    def draw_noise(self, seeds: Sequence[int]) -> Tensor:
        """Latents ``(len(seeds), ...)`` at ``sigma = 1``, one seed an image."""
        ...

    def sigmas(self, num_steps: int) -> Tensor:
        """Noise levels ``(num_steps + 1,)`` for the model's resolution, descending to 0."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, embeddings: E) -> Tensor:
        """Velocity, guidance included, of ``latents (B, ...)`` at per-sample ``sigma (B,)``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)``, about [0, 1], differentiable."""
        ...


@dataclass(frozen=True)
class PromptedVelocity:
    """A model's velocity for a batch of prompts: a `leapalign.surrogate.ConditionedVelocity`."""

    model: FlowModel[Any]
    embeddings: Any

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return self.model.velocity(latents, sigma, self.embeddings)

    def select(self, samples: Tensor) -> VelocityFn:
        return PromptedVelocity(self.model, self.embeddings[samples])


def load_model(config: ModelConfig) -> FlowModel[Any]:
    """The model that ``config`` names. Raises UserError where it cannot be read."""
    return flux.FluxModel.load(resolve(config.path), config.height, config.width, config.guidance)


def encode_prompts(config: ModelConfig, prompts: Sequence[str]) -> Any:
    """Embeddings of ``prompts``, indexable by sample, by the text encoders of the model that ``config`` names.

    Raises UserError where there are none.
    """
    return flux.encode_prompts(resolve(config.path), prompts)
