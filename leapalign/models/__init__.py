"""Backbone families behind one protocol: prompt embeddings and latents in, velocity out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from leapalign.config import ModelConfig
from leapalign.embedded import resolve
from leapalign.models import flux
from leapalign.models.protocol import FlowModel
from leapalign.models.velocity import GuidedEmbeddings


def load_model(config: ModelConfig) -> FlowModel[Any]:
    """The model that ``config`` names. Raises UserError where it cannot be read."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    return flux.FluxModel.load(resolve(config.path), config.height, config.width, config.guidance, dtype)


def encode_prompts(config: ModelConfig, prompts: Sequence[str]) -> Any:
    """Embeddings of ``prompts``, indexable by sample, by the text encoders of the model that ``config`` names.

    With those of the negative prompt, where ``config`` asks for classifier-free guidance. Raises UserError where
    there are no text encoders.
    """
    embeddings = flux.encode_prompts(resolve(config.path), prompts)
    if config.true_cfg_scale == 1:
        return embeddings
    negative = flux.encode_prompts(resolve(config.path), [config.negative_prompt])
    return GuidedEmbeddings(embeddings, negative, config.true_cfg_scale, config.true_cfg_batched)
