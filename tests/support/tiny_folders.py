"""Tiny models of the real classes, random weights, saved as their makers publish them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from small_models import small_vae
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from leapalign.tiny.model import (
    build_autoencoder,
    build_pooled_encoder,
    build_token_encoder,
    build_transformer,
    save_model,
)

TOKENS = 12
"""Longest prompt of the tokenizers."""
PROMPTS = ["a red circle", "two blue squares and a green cross"]
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})


def save_flux(folder: Path) -> None:
    """FLUX.1 of the tiny world's sizes."""
    torch.manual_seed(0)
    save_model(folder, build_transformer(), build_pooled_encoder(), build_token_encoder(), build_autoencoder())


def save_stable_diffusion_3(folder: Path) -> None:
    """Stable Diffusion 3.5 as published: dual attention in the first block, as medium has it, q and k normed."""
    torch.manual_seed(0)
    clips = [_clip(width, projection) for width, projection in ((16, 16), (24, 24))]
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=40,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(),
        text_encoder=clips[0],
        tokenizer=_clip_tokenizer("<|endoftext|>"),
        text_encoder_2=clips[1],
        tokenizer_2=_clip_tokenizer("!</w>"),
        text_encoder_3=_t5(),
        tokenizer_3=_t5_tokenizer(),
    ).save_pretrained(folder)


def _clip(width: int, projection: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(_clip_vocabulary()[0]),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges that make every word of `WORDS` one token."""
    tokens = ["<|startoftext|>", "<|endoftext|>", "!</w>"]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        prefixes = list(itertools.accumulate(pieces))
        merges += [pair for pair in zip(prefixes[:-1], pieces[1:], strict=True) if pair not in merges]
        tokens += [token for token in dict.fromkeys((*pieces, *prefixes)) if token not in tokens]
    return {token: index for index, token in enumerate(tokens)}, merges


def _clip_tokenizer(pad: str) -> CLIPTokenizer:
    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocabulary, merges, pad_token=pad, model_max_length=TOKENS)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=48,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return T5TokenizerFast(pieces, extra_ids=0, model_max_length=TOKENS)


def save_qwen_image(folder: Path) -> None:
    """Qwen-Image as published."""
    torch.manual_seed(0)
    tokenizer = _qwen_tokenizer()
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            num_res_blocks=1,
            latents_mean=[-0.76, 0.11, 1.55, -0.29],
            latents_std=[2.82, 1.45, 2.07, 1.92],
        ),
        text_encoder=_qwen(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder)


def _qwen(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a word, of the pipeline's template as well: of this the pipeline drops a fixed number of tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    template = QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    for token in special:
        template = template.replace(token, "\n")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator([template.format(prompt) for prompt in PROMPTS], trainer)
    learnt = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    return Qwen2Tokenizer(learnt["vocab"], merges, additional_special_tokens=special[1:], model_max_length=TOKENS)
