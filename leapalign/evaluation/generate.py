"""Images from a model without gradients: one prompt and one seed each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from leapalign.config import Config, SigmaSpacing
from leapalign.inputs.validation import UserError, brief
from leapalign.memory.placement import place_for_sampling, training_device
from leapalign.models import load_model
from leapalign.models.patching import patch_networks
from leapalign.models.protocol import FlowModel
from leapalign.models.velocity import prompted_velocity, require_fit
from leapalign.models.weights import load_weights
from leapalign.reports.progress import progress
from leapalign.rollout import sample_rollout


def sampling_model(config: Config, weights: Path | None) -> FlowModel:
    """The model that ``config`` names, ready to make images: the base, or with a checkpoint's ``weights``.

    Raises UserError for weights of another model.
    """
    model = load_model(config.model)
    if weights is not None:
        try:
            load_weights(model.transformer, weights)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"'{weights}' does not fit '{config.model.path}' ({brief(error)}); check model") from None
    patch_networks(model, config.kernels)
    place_for_sampling(model, config.memory, training_device())
    return model


def generate(
    model: FlowModel,
    embeddings: Any,
    seeds: Sequence[int],
    num_steps: int,
    batch_size: int = 32,
    description: str = "images",
    spacing: SigmaSpacing = "pipeline",
) -> Tensor:
    """Images ``(len(seeds), 3, H, W)`` in [0, 1]; image i comes from ``embeddings[i]`` and ``seeds[i]``.

    ``description`` stands at the bar that shows the progress; ``spacing`` is that of the noise levels.
    """
    sigmas = model.sigmas(num_steps, spacing)
    return torch.cat(list(image_batches(model, embeddings, seeds, sigmas, batch_size, description)))


def image_batches(
    model: FlowModel,
    embeddings: Any,
    seeds: Sequence[int],
    sigmas: Tensor,
    batch_size: int,
    description: str = "images",
) -> Iterator[Tensor]:
    """The images of `generate` down the noise levels ``sigmas (T + 1,)``, ``batch_size`` at a time, on the CPU."""
    for _, images in batches(model, embeddings, seeds, sigmas, batch_size, description):
        yield images.cpu()


def batches(
    model: FlowModel, embeddings: Any, seeds: Sequence[int], sigmas: Tensor, batch_size: int, description: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents and images of `sample`, ``batch_size`` at a time, where the model computes."""
    require_fit(model, embeddings)
    with sampling_progress(description, len(seeds), batch_size, len(sigmas) - 1) as step:
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            yield sample(model, embeddings[part], seeds[part], sigmas, step)


@contextlib.contextmanager
def sampling_progress(description: str, count: int, batch_size: int, num_steps: int) -> Iterator[Callable[[], object]]:
    """A bar over the steps of all batches of ``count`` images, and what moves it by one."""
    with progress(description, math.ceil(count / batch_size) * num_steps, "step") as bar:
        yield bar.update


@torch.no_grad()
def sample(
    model: FlowModel, embeddings: Any, seeds: Sequence[int], sigmas: Tensor, step: Callable[[], object]
) -> tuple[Tensor, Tensor]:
    """Latents ``(B, ...)`` and images ``(B, 3, H, W)`` in [0, 1] of one batch, where the model computes.

    ``step`` is called after each velocity.
    """
    velocity = prompted_velocity(model, embeddings)

    def counted(latents: Tensor, sigma: Tensor) -> Tensor:
        found = velocity(latents, sigma)
        step()
        return found

    rollout = sample_rollout(counted, model.draw_noise(seeds), sigmas)
    return rollout.latents[-1], model.decode(rollout.latents[-1]).clamp(0, 1)
