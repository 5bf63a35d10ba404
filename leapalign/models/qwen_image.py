"""Qwen-Image: packed latents, prompts of different lengths under a mask, and guidance that keeps a velocity's norm."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor

from leapalign.config import ModelConfig, SigmaSpacing
from leapalign.inputs.prompt_limits import PromptLimit
from leapalign.inputs.validation import UserError
from leapalign.memory.constants import made_there
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.folder import Parts
from leapalign.models.latents import linear_sigmas, normal_latents, resolution_shift, rounded_time
from leapalign.models.text_encoders import LimitedEncoder, Residence, TextEncoder, loaded_in_turn
from leapalign.models.text_length import TextLength


class QwenImageModel:
    """One Qwen-Image model for images of ``height x width`` pixels.

    Latents are packed, ``(B, tokens, channels)``, as the transformer takes them. Raises UserError for a size that does
    not divide into tokens.
    """

    text_length = TextLength(default=512, longest=1024)

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage,
        height: int,
        width: int,
        tokens: int = text_length.default,
    ) -> None:
        self.transformer = transformer.eval()
        self.scheduler = scheduler
        # Trained through, never itself.
        self.decoder = vae.eval().requires_grad_(False)
        self.device, self.tokens = torch.device("cpu"), tokens
        # 2x2 latents make a token.
        pixels_per_token = 2 * 2 ** len(vae.config.temperal_downsample)
        if height % pixels_per_token or width % pixels_per_token:
            raise UserError(f"model.height {height} and model.width {width} must be multiples of {pixels_per_token}")
        self.rows, self.columns = height // pixels_per_token, width // pixels_per_token

    @classmethod
    def assemble(cls, parts: Parts, config: ModelConfig) -> QwenImageModel:
        """The model of ``parts``. Raises UserError where one cannot be read."""
        return cls(
            parts.part(QwenImageTransformer2DModel, "transformer"),
            parts.part(FlowMatchEulerDiscreteScheduler, "scheduler"),
            parts.part(AutoencoderKLQwenImage, "vae"),
            config.height,
            config.width,
            cls.text_length.of(config.max_sequence_length),
        )

    @staticmethod
    def text_encoders(folder: str, residence: Residence, tokens: int) -> Iterator[TextEncoder]:
        """Qwen2.5-VL's, for ``tokens (B, L, D)`` and ``mask (B, L)`` bool, true where a prompt has a token."""
        encoders = [(("text_encoder", "tokenizer"), functools.partial(_qwen, tokens))]
        return loaded_in_turn(QwenImagePipeline, folder, encoders, residence)

    def blank_embeddings(self, count: int, tokens: int) -> PromptEmbeddings:
        """Embeddings of nothing for ``count`` prompts, as long as those of a tokenizer that allows ``tokens``."""
        length, width = min(tokens, self.tokens), self.transformer.config.joint_attention_dim
        return PromptEmbeddings(
            {"tokens": torch.zeros(count, length, width), "mask": torch.ones(count, length, dtype=torch.bool)}
        )

    def draw_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents, one seed an image: ``(len(seeds), tokens, channels)`` float32."""
        shape = (self.rows * self.columns, self.transformer.config.in_channels)
        return normal_latents(seeds, shape).to(self.device)

    def sigmas(self, num_steps: int, spacing: SigmaSpacing = "pipeline") -> Tensor:
        """The scheduler's noise levels ``(num_steps + 1,)`` for this resolution; the pipeline's are linear."""
        shift = resolution_shift(self.scheduler.config, self.rows * self.columns)
        return linear_sigmas(self.scheduler, num_steps, shift)

    def velocity(self, latents: Tensor, sigma: Tensor, embeddings: PromptEmbeddings) -> Tensor:
        """``latents (B, tokens, channels)``, per-sample ``sigma (B,)`` -> velocity of the same shape."""
        device, dtype = latents.device, self.transformer.dtype
        return self.transformer(
            hidden_states=latents.to(dtype),
            timestep=rounded_time(self.scheduler, sigma.to(device), dtype),
            encoder_hidden_states=embeddings.parts["tokens"].to(device, dtype),
            # Fewer attention kernels take a mask.
            encoder_hidden_states_mask=(
                None if bool(embeddings.known("mask").all()) else embeddings.parts["mask"].to(device)
            ),
            img_shapes=[[(1, self.rows, self.columns)]] * len(latents),
            return_dict=False,
        )[0]

    def guide(self, prompt: Tensor, negative: Tensor, scale: float) -> Tensor:
        """``negative + scale (prompt - negative)``, each token of it as long as that of ``prompt``."""
        combined = negative + scale * (prompt - negative)
        return combined * (prompt.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def decode(self, latents: Tensor) -> Tensor:
        """Packed latents to images ``(B, 3, H, W)``; about [0, 1], not clamped."""
        vae = self.decoder
        unpacked = QwenImagePipeline._unpack_latents(latents, 2 * self.rows, 2 * self.columns, vae_scale_factor=1)
        mean, std = (
            made_there(values, latents).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        scaled = (unpacked * std + mean).to(vae.dtype)
        # Not `vae.decode`, which clamps images, and has no gradient where it does; and which keeps features of a
        # video's past frames, where recomputation would find them changed. For one frame the rest is the same.
        pixels = vae.decoder(vae.post_quant_conv(scaled))[:, :, 0].to(latents.dtype)
        return pixels / 2 + 0.5


def _qwen(most: int, pipeline: Any) -> TextEncoder:
    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens, mask = pipeline._get_qwen_prompt_embeds(list(prompts))
        return {"tokens": tokens[:, :most], "mask": mask[:, :most].bool()}

    # Of the template's tokens the first ones are dropped once they are read.
    dropped = pipeline.prompt_template_encode_start_idx
    whole = PromptLimit.of(pipeline.tokenizer, most + dropped, pipeline.prompt_template_encode.format)
    return LimitedEncoder(
        encode, PromptLimit(most, lambda prompts: [length - dropped for length in whole.lengths(prompts)])
    )
