"""Stable Diffusion 3 and 3.5, medium and large: three text encoders, latents of the VAE's own shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from leapalign.config import ModelConfig, SigmaSpacing
from leapalign.inputs.prompt_limits import PromptLimit
from leapalign.inputs.validation import UserError
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.folder import Parts, holds
from leapalign.models.latents import decoded, linear_sigmas, normal_latents, resolution_shift
from leapalign.models.text_encoders import LimitedEncoder, Residence, TextEncoder, loaded_in_turn
from leapalign.models.text_length import TextLength

CLIP_TOKENS = 77
"""Length of a prompt to both CLIP encoders."""
T5 = "text_encoder_3"
"""Which a model may come without: zeros then stand for what it would make of a prompt."""


class StableDiffusion3Model:
    """One Stable Diffusion 3 model for images of ``height x width`` pixels.

    Latents are ``(B, C, H/8, W/8)``, 8 being the VAE's factor. Raises UserError for a size that does not divide into
    patches, or has more of them than the model has positions for.
    """

    text_length = TextLength(default=256, longest=512)

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        height: int,
        width: int,
        t5: bool = True,
        tokens: int = text_length.default,
    ) -> None:
        """t5: whether prompts are encoded with T5, too. tokens: most that it reads of a prompt."""
        self.transformer = transformer.eval()
        self.scheduler = scheduler
        # Trained through, never itself.
        self.decoder = vae.eval().requires_grad_(False)
        self.device = torch.device("cpu")
        factor, patch = 2 ** (len(vae.config.block_out_channels) - 1), transformer.config.patch_size
        if height % (factor * patch) or width % (factor * patch):
            raise UserError(f"model.height {height} and model.width {width} must be multiples of {factor * patch}")
        longest = transformer.config.pos_embed_max_size * factor * patch
        if max(height, width) > longest:
            raise UserError(f"model.height {height} and model.width {width} must be at most {longest}")
        self.rows, self.columns = height // factor, width // factor
        self.t5, self.tokens = t5, tokens

    @classmethod
    def assemble(cls, parts: Parts, config: ModelConfig) -> StableDiffusion3Model:
        """The model of ``parts``. Raises UserError where one cannot be read."""
        return cls(
            parts.part(SD3Transformer2DModel, "transformer"),
            parts.part(FlowMatchEulerDiscreteScheduler, "scheduler"),
            parts.part(AutoencoderKL, "vae"),
            config.height,
            config.width,
            parts.holds(T5),
            cls.text_length.of(config.max_sequence_length),
        )

    @staticmethod
    def text_encoders(folder: str, residence: Residence, tokens: int) -> Iterator[TextEncoder]:
        """Both CLIPs', for ``clip (B, L, C)`` and ``pooled (B, P)``; then T5's, if any, for ``t5 (B, M, D)``."""
        # The pipeline asks the first CLIP for the dtype of the second: they come together.
        clips = [(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"), _clip)]
        t5 = [((T5, "tokenizer_3"), functools.partial(_t5, tokens))] if holds(folder, T5) else []
        return loaded_in_turn(StableDiffusion3Pipeline, folder, [*clips, *t5], residence)

    def blank_embeddings(self, count: int, tokens: int) -> PromptEmbeddings:
        """Embeddings of nothing for ``count`` prompts, as long as those of a tokenizer that allows ``tokens``."""
        config = self.transformer.config
        # CLIP's parts side by side, each token's as wide as its pooled embedding.
        clip = torch.zeros(count, min(tokens, CLIP_TOKENS), config.pooled_projection_dim)
        t5 = {"t5": torch.zeros(count, min(tokens, self.tokens), config.joint_attention_dim)} if self.t5 else {}
        return PromptEmbeddings({"clip": clip, "pooled": torch.zeros(count, config.pooled_projection_dim), **t5})

    def draw_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents, one seed an image: ``(len(seeds), C, H/8, W/8)`` float32."""
        shape = (self.transformer.config.in_channels, self.rows, self.columns)
        return normal_latents(seeds, shape).to(self.device)

    def sigmas(self, num_steps: int, spacing: SigmaSpacing = "pipeline") -> Tensor:
        """The scheduler's noise levels ``(num_steps + 1,)``, for this resolution where they depend on it.

        The pipeline spaces those evenly that are shifted already, and shifts them again.
        """
        config, patch = self.scheduler.config, self.transformer.config.patch_size
        shift = resolution_shift(config, (self.rows // patch) * (self.columns // patch))
        if spacing == "linear":
            return linear_sigmas(self.scheduler, num_steps, shift)
        self.scheduler.set_timesteps(num_steps, mu=shift if config.use_dynamic_shifting else None)
        return self.scheduler.sigmas.clone()

    def velocity(self, latents: Tensor, sigma: Tensor, embeddings: PromptEmbeddings) -> Tensor:
        """``latents (B, C, H/8, W/8)``, per-sample ``sigma (B,)`` -> velocity of the same shape."""
        device, dtype = latents.device, self.transformer.dtype
        parts = {name: part.to(device, dtype) for name, part in embeddings.parts.items()}
        clip, pooled, t5 = parts["clip"], parts["pooled"], parts.get("t5")
        if t5 is None:
            t5 = clip.new_zeros(len(clip), self.tokens, self.transformer.config.joint_attention_dim)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return self.transformer(
            hidden_states=latents.to(dtype),
            # Not in the dtype of the weights: the model embeds time in float32.
            timestep=sigma.to(device) * self.scheduler.config.num_train_timesteps,
            encoder_hidden_states=torch.cat([clip, t5], dim=1),
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images ``(B, 3, H, W)``; about [0, 1], not clamped."""
        return decoded(self.decoder, latents)


def _clip(pipeline: Any) -> TextEncoder:
    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens, pooled = zip(
            *(pipeline._get_clip_prompt_embeds(list(prompts), clip_model_index=index) for index in (0, 1)), strict=True
        )
        return {"clip": torch.cat(tokens, dim=-1), "pooled": torch.cat(pooled, dim=-1)}

    # The two tokenizers differ in how they pad, and in nothing else.
    return LimitedEncoder(encode, PromptLimit.of(pipeline.tokenizer, pipeline.tokenizer_max_length))


def _t5(tokens: int, pipeline: Any) -> TextEncoder:
    length, dtype = min(tokens, pipeline.tokenizer_3.model_max_length), pipeline.text_encoder_3.dtype
    return LimitedEncoder(
        lambda prompts: {"t5": pipeline._get_t5_prompt_embeds(list(prompts), max_sequence_length=length, dtype=dtype)},
        PromptLimit.of(pipeline.tokenizer_3, length),
    )
