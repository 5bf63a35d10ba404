"""What a backbone family has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

E = TypeVar("E", contravariant=True)


class FlowModel(Protocol[E]):
    """One flow-matching model at one resolution; ``E`` is its kind of prompt embeddings (indexable by sample)."""

    device: torch.device
    """Where it computes: noise is drawn for it, and latents stay there."""

    @property
    def transformer(self) -> torch.nn.Module:
        """The network that is trained."""
        ...

    @property
    def decoder(self) -> torch.nn.Module | None:
        """The network that makes images of latents; None where latents are images."""
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
