"""Images from a model without gradients: one prompt and one seed each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leapalign.models.protocol import FlowModel
from leapalign.models.velocity import prompted_velocity
from leapalign.rollout import sample_rollout


@torch.no_grad()
def generate(
    model: FlowModel,
    embeddings: Any,
    seeds: Sequence[int],
    num_steps: int,
    batch_size: int = 32,
) -> Tensor:
    """Images ``(len(seeds), 3, H, W)`` in [0, 1]; image i comes from ``embeddings[i]`` and ``seeds[i]``."""
    sigmas = model.sigmas(num_steps)
    images = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        noise = model.draw_noise(seeds[part])
        rollout = sample_rollout(prompted_velocity(model, embeddings[part]), noise, sigmas)
        images.append(model.decode(rollout.latents[-1]).clamp(0, 1).cpu())
    return torch.cat(images)
