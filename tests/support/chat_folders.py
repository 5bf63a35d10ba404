"""Tiny FLUX.2 and Z-Image of the real classes, random weights, saved as published: language models encode prompts."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TOKENS = 64
"""Longest prompt of the tokenizer: a token a byte, and five of the chat template."""
PIXTRAL = "transformers.models.pixtral"
IMAGE_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role[0] }}{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
"""Qwen3's in little: roles are a letter."""
MISTRAL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role[0] }}{{ message.content[0].text }}<|im_end|>{% endfor %}"
)
LAYERS, WIDTH = 28, 8
"""FLUX.2 klein takes the hidden states after 9, 18 and 27 layers."""


def save_flux2_klein(folder: Path) -> None:
    """FLUX.2 klein base as published, with batch-norm statistics that matter."""
    torch.manual_seed(0)
    Flux2KleinPipeline(
        scheduler=flux2_scheduler(),
        vae=small_flux2_vae(),
        text_encoder=small_qwen3(),
        tokenizer=byte_tokenizer(),
        transformer=small_flux2(joint_attention_dim=3 * WIDTH, guidance_embeds=False),
    ).save_pretrained(folder)


def save_flux2_dev(folder: Path) -> None:
    """FLUX.2 dev as published: its tokenizer is a processor, which takes images, too."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(MISTRAL_TEMPLATE)
    tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
    Flux2Pipeline(
        scheduler=flux2_scheduler(),
        vae=small_flux2_vae(),
        text_encoder=small_mistral3(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=small_flux2(joint_attention_dim=3 * WIDTH, guidance_embeds=True),
    ).save_pretrained(folder)
    PixtralImageProcessorPil().save_pretrained(folder / "tokenizer")
    settings = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    (folder / "tokenizer" / "processor_config.json").write_text(json.dumps(settings))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", "PixtralProcessor"]}))


def pixtral_processor(folder: Path) -> Any:
    """FLUX.2 dev's own processor, which without torchvision is not to be had but for text."""
    images = types.ModuleType(f"{PIXTRAL}.image_processing_pixtral")
    images.get_resize_output_image_size = None  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {images.__name__: images}):
        kind = importlib.import_module(f"{PIXTRAL}.processing_pixtral").PixtralProcessor
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return kind(PixtralImageProcessorPil(), tokenizer, chat_template=tokenizer.chat_template)


def small_flux2(joint_attention_dim: int, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=joint_attention_dim,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def flux2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def small_flux2_vae() -> AutoencoderKLFlux2:
    """At a factor of 4."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 3)
    return vae


def save_z_image(folder: Path) -> None:
    """Z-Image as published: the text encoder's files are those of the whole language model, the index asks for less."""
    torch.manual_seed(0)
    whole = small_qwen3()
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=whole.model,
        tokenizer=byte_tokenizer(),
        transformer=small_z_image(),
    ).save_pretrained(folder)
    whole.save_pretrained(folder / "text_encoder")


def small_z_image() -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=3,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[128, 16, 16],
    )
    with torch.no_grad():
        # Zero before training: nobody would see them missing.
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return transformer


def small_qwen3() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(byte_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        eos_token_id=0,
        # Deep and narrow: at the usual range nothing of the prompt would be left to see.
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config)


def small_mistral3(vocabulary: int) -> Mistral3ForConditionalGeneration:
    """FLUX.2 dev takes the hidden states after 10, 20 and 30 layers."""
    text = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=31,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
    )
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def byte_tokenizer(template: str = CHAT_TEMPLATE) -> Qwen2Tokenizer:
    """Qwen's without merges."""
    tokens = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    return Qwen2Tokenizer(
        {token: index for index, token in enumerate(tokens)},
        [],
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=template,
        model_max_length=TOKENS,
    )
