"""Backbone families behind one protocol: prompt embeddings and latents in, velocity out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from leapalign.config import ModelConfig
from leapalign.inputs.prompt_limits import warn_of_cut
from leapalign.inputs.validation import UserError
from leapalign.memory.blocks import in_blocks
from leapalign.memory.compilation import require_compiler
from leapalign.memory.placement import training_device
from leapalign.memory.quantization import quantize, require_quantizer
from leapalign.models.embeddings import PromptEmbeddings, joined
from leapalign.models.flux import FluxModel
from leapalign.models.flux2 import Flux2DevModel, Flux2KleinModel
from leapalign.models.folder import ModelFolder, Parts, read_index
from leapalign.models.lora import add_adapter, planned_adapter, start_adapter
from leapalign.models.protocol import Family, FlowModel
from leapalign.models.qwen_image import QwenImageModel
from leapalign.models.stable_diffusion_3 import StableDiffusion3Model
from leapalign.models.text_encoders import ENCODER_QUANTIZATION, Residence, TextEncoder
from leapalign.models.velocity import GuidedEmbeddings
from leapalign.models.z_image import ZImageModel
from leapalign.reports.progress import progress
from leapalign.storage.embedded import resolve

FAMILIES: dict[str, Family] = {
    "FluxPipeline": FluxModel,
    "QwenImagePipeline": QwenImageModel,
    "StableDiffusion3Pipeline": StableDiffusion3Model,
    "Flux2Pipeline": Flux2DevModel,
    "Flux2KleinPipeline": Flux2KleinModel,
    "ZImagePipeline": ZImageModel,
}
"""By the class of pipeline in a model's ``model_index.json``."""
QUANTIZATION = "model.quantization"
ENCODED_AT_ONCE = 16
"""Prompts; T5 attends over 512 tokens each, 1 GiB of float32 scores a layer for 16."""


def load_model(config: ModelConfig) -> FlowModel:
    """The model that ``config`` names, with its weights. Raises UserError where it cannot be read, compiled or
    quantized."""
    if config.compile:
        require_compiler(training_device())
    dtype = getattr(torch, config.dtype)
    require_quantizer(config.quantization, dtype, training_device(), QUANTIZATION)
    with progress("load the model", 1, "model") as bar:
        model = assembled(ModelFolder(resolve(config.path), dtype), config)
        quantize_blocks(model, config, training_device())
        bar.update()
    if config.adapted:
        plan = planned_adapter(model.transformer, config)
        add_adapter(model.transformer, plan)
        start_adapter(model.transformer, plan)
    if config.compile:
        compile_blocks(model.transformer)
    return model


def quantize_blocks(model: FlowModel, config: ModelConfig, device: torch.device) -> None:
    """Quantizes the transformer's blocks on ``device``, where ``config`` says so. Raises UserError as `quantize`."""
    if config.quantization is not None:
        inside = partial(in_blocks, model.transformer)
        quantize(model.transformer, config.quantization, device, inside, QUANTIZATION)


def compile_blocks(transformer: Any) -> None:
    """Compiles blocks that repeat, each kind once, when they first run. Raises UserError where the class names none."""
    if not getattr(transformer, "_repeated_blocks", None):
        raise UserError(f"{type(transformer).__name__} does not say which blocks repeat; set model.compile to false")
    transformer.compile_repeated_blocks()


def assembled(parts: Parts, config: ModelConfig) -> FlowModel:
    """The model of ``parts``, by its family. Raises UserError where one cannot be read."""
    family = family_of(parts.path)
    family.text_length.of(config.max_sequence_length)  # or its refusal would come after the weights
    return family.assemble(parts, config)


def family_of(path: str) -> Family:
    """The family of the model in a folder or hub id. Raises UserError where it is none of ours."""
    name = str(read_index(path).get("_class_name"))
    if name not in FAMILIES:
        raise UserError(f"'{path}' is made for {name}, which is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def encode_prompts(
    config: ModelConfig, prompts: Sequence[str], what: str = "prompts", quantization: str | None = None
) -> Any:
    """Embeddings of ``prompts``, indexable by sample, by the text encoders of the model that ``config`` names.

    With those of the negative prompt, where ``config`` asks for classifier-free guidance. Warns of those that a text
    encoder cuts, naming them ``what``. quantization: as of `text_encoders`. Raises UserError where there are no text
    encoders.
    """
    embeddings = _encoded(config, [*prompts, *negative_prompts(config)], what, quantization)
    return guided(config, embeddings[: len(prompts)], embeddings[len(prompts) :])


def negative_prompts(config: ModelConfig) -> list[str]:
    """The prompt that classifier-free guidance steers away from; none where ``config`` does not ask for guidance."""
    return [config.negative_prompt] if config.true_cfg_scale != 1 else []


def guided(config: ModelConfig, prompts: Any, negative: Any) -> Any:
    """Embeddings of prompts, with those of `negative_prompts` where there are any."""
    if config.true_cfg_scale == 1:
        return prompts
    return GuidedEmbeddings(prompts, negative[:], config.true_cfg_scale, config.true_cfg_batched, config.cfg_gradient)


def text_encoders(config: ModelConfig, device: torch.device, quantization: str | None = None) -> Iterator[TextEncoder]:
    """One after the other, on ``device``: in bfloat16 on a GPU, in the model's dtype on a CPU.

    quantization: of their blocks' matrices, as `leapalign.memory.quantization.KINDS` names it. Raises UserError where
    there are none, where it does not work here, or one lacks something: before the first encodes thousands of prompts.
    """
    path, residence = resolve(config.path), Residence(device, text_dtype(config, device), quantization)
    require_quantizer(quantization, residence.dtype, device, ENCODER_QUANTIZATION)
    return family_of(path).text_encoders(path, residence, text_tokens(config))


def text_tokens(config: ModelConfig) -> int:
    """Most tokens of a prompt that ``config`` has encoded. Raises UserError where the model does not take so many."""
    return family_of(resolve(config.path)).text_length.of(config.max_sequence_length)


def text_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """What text encoders compute in on ``device``."""
    return torch.bfloat16 if device.type == "cuda" else getattr(torch, config.dtype)


@torch.no_grad()
def encoded(encode: TextEncoder, prompts: Sequence[str]) -> Iterator[PromptEmbeddings]:
    """What ``encode`` makes of ``prompts``, some at a time, in host memory."""
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        yield PromptEmbeddings(encode(prompts[start : start + ENCODED_AT_ONCE])).to(torch.device("cpu"))


def _encoded(config: ModelConfig, prompts: Sequence[str], what: str, quantization: str | None) -> PromptEmbeddings:
    parts: dict[str, torch.Tensor] = {}
    number = 0
    for encode in text_encoders(config, torch.device("cpu"), quantization):
        number += 1  # noqa: SIM113 -- `enumerate` would keep the encoder while the next one is loaded
        name = f"text encoder {number}"
        warn_of_cut([(name, encode)], lambda: prompts, what)
        made = []
        with progress(f"encode {what}, {name}", len(prompts), "prompt") as bar:
            for batch in encoded(encode, prompts):
                made.append(batch)
                bar.update(len(batch))
        parts |= joined(made).parts
        del encode  # or two encoders would be there at once
    return PromptEmbeddings(parts)
