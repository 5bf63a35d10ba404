"""The tiny FLUX: the real diffusers and transformers classes at a size that trains on a laptop CPU.

A folder in the diffusers FLUX.1 layout: a picture of 64 x 64 pixels has 8 x 8 latents of 4 channels, packed 2 x 2
into 16 tokens of 16 channels.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from leapalign.storage.modes import save_pretrained
from leapalign.tiny.world import COLORS, IMAGE_SIZE, NUMBERS, PLURALS, SHAPES

MAX_TOKENS = 8
TEXT_WIDTH = 64
LATENT_CHANNELS = 4
SPECIAL = ("<pad>", "<eos>", "<unk>")
WORDS = ("a", "and", "left", "right", "of", "above", "below", *COLORS, *SHAPES, *PLURALS.values(), *NUMBERS.values())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, ``<eos>`` at the end, padded to ``MAX_TOKENS``."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocabulary["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def build_pooled_encoder(width: int = TEXT_WIDTH) -> CLIPTextModel:
    """The encoder of the pooled embedding: FLUX.1's first text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return CLIPTextModel(config)


def build_token_encoder() -> T5EncoderModel:
    """The encoder of the per-token embeddings: FLUX.1's second text encoder."""
    config = T5Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=MAX_TOKENS,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def build_transformer() -> FluxTransformer2DModel:
    """Velocity network over 4 x 4 tokens, each 2 x 2 latents: 16 x 16 pixels."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 8, 8),
    )


def build_autoencoder() -> AutoencoderKL:
    """Pictures to latents an eighth as high and wide, and back: FLUX.1's class without its attention."""
    widths = (12, 24, 48, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler: resolution-dependent shift between ``base_shift`` and ``max_shift``."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def save_model(
    folder: Path,
    transformer: FluxTransformer2DModel,
    pooled_encoder: CLIPTextModel,
    token_encoder: T5EncoderModel,
    autoencoder: AutoencoderKL,
) -> None:
    """Writes the parts in the layout ``FluxPipeline.from_pretrained`` reads."""
    tokenizer = build_tokenizer()
    parts = {
        "transformer": transformer,
        "scheduler": build_scheduler(),
        "text_encoder": pooled_encoder,
        "text_encoder_2": token_encoder,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "vae": autoencoder,
    }
    for name, part in parts.items():
        save_pretrained(part, folder / name)
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def encoded(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Images ``(B, 3, H, W)`` in [0, 1] to packed latents ``(B, tokens, channels)``, scaled as the base takes them."""
    latents = autoencoder.encode(2 * images - 1).latent_dist.mean
    latents = (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)
