"""Backbone families behind one protocol: prompt embeddings and latents in, velocity out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from leapalign.config import ModelConfig
from leapalign.embedded import resolve
from leapalign.models.embeddings import PromptEmbeddings, joined
from leapalign.models.flux import FluxModel
from leapalign.models.flux2 import Flux2DevModel, Flux2KleinModel
from leapalign.models.folder import ModelFolder, Parts, read_index
from leapalign.models.protocol import Family, FlowModel
from leapalign.models.velocity import GuidedEmbeddings
from leapalign.models.z_image import ZImageModel
from leapalign.validation import UserError

FAMILIES: dict[str, Family] = {
    "FluxPipeline": FluxModel,
    "Flux2Pipeline": Flux2DevModel,
    "Flux2KleinPipeline": Flux2KleinModel,
    "ZImagePipeline": ZImageModel,
}
"""By the class of pipeline in a model's ``model_index.json``."""
ENCODED_AT_ONCE = 64


def load_model(config: ModelConfig) -> FlowModel:
    """The model that ``config`` names, with its weights. Raises UserError where it cannot be read."""
    return assembled(ModelFolder(resolve(config.path), getattr(torch, config.dtype)), config)


def assembled(parts: Parts, config: ModelConfig) -> FlowModel:
    """The model of ``parts``, by its family. Raises UserError where one cannot be read."""
    return family_of(parts.path).assemble(parts, config)


def family_of(path: str) -> Family:
    """The family of the model in a folder or hub id. Raises UserError where it is none of ours."""
    name = str(read_index(path).get("_class_name"))
    if name not in FAMILIES:
        raise UserError(f"'{path}' is made for {name}, which is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def encode_prompts(config: ModelConfig, prompts: Sequence[str]) -> Any:
    """Embeddings of ``prompts``, indexable by sample, by the text encoders of the model that ``config`` names.

    With those of the negative prompt, where ``config`` asks for classifier-free guidance. Raises UserError where
    there are no text encoders.
    """
    guided = config.true_cfg_scale != 1
    embeddings = _encoded(config, [*prompts, config.negative_prompt] if guided else prompts)
    if not guided:
        return embeddings
    return GuidedEmbeddings(embeddings[:-1], embeddings[-1:], config.true_cfg_scale, config.true_cfg_batched)


@torch.no_grad()
def _encoded(config: ModelConfig, prompts: Sequence[str]) -> PromptEmbeddings:
    path = resolve(config.path)
    parts: dict[str, torch.Tensor] = {}
    for encode in family_of(path).text_encoders(path, torch.device("cpu"), torch.float32):
        batches = [prompts[start : start + ENCODED_AT_ONCE] for start in range(0, len(prompts), ENCODED_AT_ONCE)]
        parts |= joined([PromptEmbeddings(encode(batch)) for batch in batches]).parts
        del encode  # or two encoders would be there at once
    return PromptEmbeddings(parts)
