"""FLUX.1: packed latents in, velocity out; sigmas, guidance and latent scaling from the model's own configs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from leapalign.config import ModelConfig, SigmaSpacing
from leapalign.inputs.prompt_limits import PromptLimit
from leapalign.inputs.validation import UserError
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.folder import Parts
from leapalign.models.latents import decoded, linear_sigmas, normal_latents, resolution_shift, rounded_time
from leapalign.models.text_encoders import Encoding, LimitedEncoder, Residence, TextEncoder, loaded_in_turn
from leapalign.models.text_length import TextLength


class FluxModel:
    """One FLUX.1 model for images of ``height x width`` pixels.

    Latents are packed, ``(B, tokens, channels)``, as the transformer takes them. Raises UserError for a size that does
    not divide into tokens.
    """

    text_length = TextLength(default=512, longest=512)

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        height: int,
        width: int,
        vae: AutoencoderKL,
        guidance: float = 3.5,
        tokens: int = text_length.default,
    ) -> None:
        self.transformer = transformer.eval()
        self.scheduler = scheduler
        # Trained through, never itself.
        self.vae = vae.eval().requires_grad_(False)
        self.guidance, self.tokens = guidance, tokens
        self.device = torch.device("cpu")
        # FLUX packs 2x2 latents into a token.
        pixels_per_token = 2 * 2 ** (len(vae.config.block_out_channels) - 1)
        if height % pixels_per_token or width % pixels_per_token:
            raise UserError(f"model.height {height} and model.width {width} must be multiples of {pixels_per_token}")
        self.rows, self.columns = height // pixels_per_token, width // pixels_per_token

    @property
    def decoder(self) -> AutoencoderKL:
        return self.vae

    @classmethod
    def assemble(cls, parts: Parts, config: ModelConfig) -> FluxModel:
        """The model of ``parts``. Raises UserError where one cannot be read."""
        return cls(
            parts.part(FluxTransformer2DModel, "transformer"),
            parts.part(FlowMatchEulerDiscreteScheduler, "scheduler"),
            config.height,
            config.width,
            parts.part(AutoencoderKL, "vae"),
            config.guidance,
            cls.text_length.of(config.max_sequence_length),
        )

    @staticmethod
    def text_encoders(folder: str, residence: Residence, tokens: int) -> Iterator[TextEncoder]:
        """CLIP's, for ``pooled (B, P)``; then T5's, for ``tokens (B, L, D)``."""
        t5: Encoding = functools.partial(_t5, tokens)
        encoders = [(("text_encoder", "tokenizer"), _clip), (("text_encoder_2", "tokenizer_2"), t5)]
        return loaded_in_turn(FluxPipeline, folder, encoders, residence)

    def blank_embeddings(self, count: int, tokens: int) -> PromptEmbeddings:
        """Embeddings of nothing for ``count`` prompts, as long as those of a tokenizer that allows ``tokens``."""
        config = self.transformer.config
        return PromptEmbeddings(
            {
                "pooled": torch.zeros(count, config.pooled_projection_dim),
                "tokens": torch.zeros(count, min(tokens, self.tokens), config.joint_attention_dim),
            }
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
        """``latents (B, tokens, channels)``, per-sample ``sigma (B,)`` -> velocity of the same shape.

        Guidance goes in as an embedding where the model was distilled for it.
        """
        device, dtype = latents.device, self.transformer.dtype
        tokens, pooled = (embeddings.parts[name].to(device, dtype) for name in ("tokens", "pooled"))
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(latents),), self.guidance, device=device, dtype=dtype)
        with torch.device(device):
            # There, as a copy from host memory would have the host wait.
            text_ids = torch.zeros(tokens.shape[1], 3, dtype=dtype)
            image_ids = FluxPipeline._prepare_latent_image_ids(len(latents), self.rows, self.columns, device, dtype)
        return self.transformer(
            hidden_states=latents.to(dtype),
            timestep=rounded_time(self.scheduler, sigma.to(device), dtype),
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Packed latents to images ``(B, 3, H, W)``; about [0, 1], not clamped."""
        batch, _, channels = latents.shape
        unpacked = latents.view(batch, self.rows, self.columns, channels // 4, 2, 2)
        unpacked = unpacked.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * self.rows, 2 * self.columns)
        return decoded(self.vae, unpacked)


def _clip(pipeline: Any) -> TextEncoder:
    return LimitedEncoder(
        lambda prompts: {"pooled": pipeline._get_clip_prompt_embeds(list(prompts))},
        PromptLimit.of(pipeline.tokenizer, pipeline.tokenizer_max_length),
    )


def _t5(tokens: int, pipeline: Any) -> TextEncoder:
    length, dtype = min(tokens, pipeline.tokenizer_2.model_max_length), pipeline.text_encoder_2.dtype
    return LimitedEncoder(
        lambda prompts: {
            "tokens": pipeline._get_t5_prompt_embeds(list(prompts), max_sequence_length=length, dtype=dtype)
        },
        PromptLimit.of(pipeline.tokenizer_2, length),
    )
