"""FLUX.2: packed latents in, velocity out; klein, whose prompts Qwen3 encodes, and dev, whose prompts Mistral 3 does.

Klein base takes classifier-free guidance (``true_cfg_scale``); dev was distilled to take ``guidance`` as an input.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from leapalign.config import ModelConfig, SigmaSpacing
from leapalign.inputs.prompt_limits import PromptLimit
from leapalign.inputs.validation import UserError
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.folder import Parts
from leapalign.models.latents import linear_sigmas, normal_latents, rounded_time
from leapalign.models.text_encoders import LimitedEncoder, Residence, TextEncoder, chat_text, loaded_in_turn
from leapalign.models.text_length import TextLength


class Flux2Model:
    """One FLUX.2 model for images of ``height x width`` pixels; how prompts are encoded, a subclass says.

    Latents are packed, ``(B, tokens, channels)``, as the transformer takes them, and in units of the VAE's batch-norm
    statistics. Raises UserError for a size that does not divide into tokens.
    """

    text_length = TextLength(default=512, longest=512)

    def __init__(
        self,
        transformer: Flux2Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLFlux2,
        height: int,
        width: int,
        guidance: float,
        tokens: int = text_length.default,
    ) -> None:
        self.transformer = transformer.eval()
        self.scheduler = scheduler
        # Trained through, never itself.
        self.decoder = vae.eval().requires_grad_(False)
        self.guidance, self.tokens = guidance, tokens
        self.device = torch.device("cpu")
        # A token is 2x2 latents.
        pixels_per_token = 2 * 2 ** (len(vae.config.block_out_channels) - 1)
        if height % pixels_per_token or width % pixels_per_token:
            raise UserError(f"model.height {height} and model.width {width} must be multiples of {pixels_per_token}")
        self.rows, self.columns = height // pixels_per_token, width // pixels_per_token

    @classmethod
    def assemble(cls, parts: Parts, config: ModelConfig) -> Flux2Model:
        """The model of ``parts``. Raises UserError where one cannot be read."""
        return cls(
            parts.part(Flux2Transformer2DModel, "transformer"),
            parts.part(FlowMatchEulerDiscreteScheduler, "scheduler"),
            parts.part(AutoencoderKLFlux2, "vae"),
            config.height,
            config.width,
            config.guidance,
            cls.text_length.of(config.max_sequence_length),
        )

    def blank_embeddings(self, count: int, tokens: int) -> PromptEmbeddings:
        """Embeddings of nothing for ``count`` prompts, as long as those of a tokenizer that allows ``tokens``."""
        width = self.transformer.config.joint_attention_dim
        return PromptEmbeddings({"tokens": torch.zeros(count, min(tokens, self.tokens), width)})

    def draw_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents, one seed an image, as the pipeline draws them: ``(len(seeds), tokens, channels)``
        float32."""
        shape = (self.transformer.config.in_channels, self.rows, self.columns)
        return Flux2KleinPipeline._pack_latents(normal_latents(seeds, shape)).to(self.device)

    def sigmas(self, num_steps: int, spacing: SigmaSpacing = "pipeline") -> Tensor:
        """The scheduler's noise levels ``(num_steps + 1,)`` for this size and number; the pipeline's are linear."""
        return linear_sigmas(self.scheduler, num_steps, compute_empirical_mu(self.rows * self.columns, num_steps))

    def velocity(self, latents: Tensor, sigma: Tensor, embeddings: PromptEmbeddings) -> Tensor:
        """``latents (B, tokens, channels)``, per-sample ``sigma (B,)`` -> velocity of the same shape.

        Guidance goes in as an embedding where the model was distilled for it.
        """
        device, dtype = latents.device, self.transformer.dtype
        tokens = embeddings.parts["tokens"].to(device, dtype)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(latents),), self.guidance, device=device, dtype=dtype)
        with torch.device(device):
            # Positions are the same for all samples; of the tensors given only shapes matter.
            text_ids = Flux2KleinPipeline._prepare_text_ids(tokens[:1])
            image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 1, self.rows, self.columns))
        return self.transformer(
            hidden_states=latents.to(dtype),
            timestep=rounded_time(self.scheduler, sigma.to(device), dtype),
            guidance=guidance,
            encoder_hidden_states=tokens,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Packed latents to images ``(B, 3, H, W)``; about [0, 1], not clamped."""
        vae = self.decoder
        unpacked = latents.transpose(1, 2).unflatten(2, (self.rows, self.columns))
        mean, variance = (
            statistic.view(1, -1, 1, 1).to(latents) for statistic in (vae.bn.running_mean, vae.bn.running_var)
        )
        scaled = unpacked * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        unpatched = Flux2KleinPipeline._unpatchify_latents(scaled)
        pixels = vae.decode(unpatched.to(vae.dtype), return_dict=False)[0].to(latents.dtype)
        return pixels / 2 + 0.5


class Flux2KleinModel(Flux2Model):
    """FLUX.2 klein: prompts are three hidden states of Qwen3, side by side."""

    @staticmethod
    def text_encoders(folder: str, residence: Residence, tokens: int) -> Iterator[TextEncoder]:
        """Qwen3's, for ``tokens (B, L, D)``."""
        encoders = [(("text_encoder", "tokenizer"), functools.partial(_klein, tokens))]
        return loaded_in_turn(Flux2KleinPipeline, folder, encoders, residence)


class Flux2DevModel(Flux2Model):
    """FLUX.2 dev: prompts, after the pipeline's system message, are three hidden states of Mistral 3, side by side."""

    @staticmethod
    def text_encoders(folder: str, residence: Residence, tokens: int) -> Iterator[TextEncoder]:
        """Mistral 3's, for ``tokens (B, L, D)``."""
        encoders = [(("text_encoder", "tokenizer"), functools.partial(_dev, tokens))]
        return loaded_in_turn(Flux2Pipeline, folder, encoders, residence)


def _klein(tokens: int, pipeline: Any) -> TextEncoder:
    length = min(tokens, pipeline.tokenizer.model_max_length)
    text = chat_text(pipeline.tokenizer, enable_thinking=False)
    return LimitedEncoder(_tokens(pipeline, length), PromptLimit.of(pipeline.tokenizer, length, text))


def _dev(tokens: int, pipeline: Any) -> TextEncoder:
    processor, system = pipeline.tokenizer, pipeline.system_message

    def lengths(prompts: Sequence[str]) -> list[int]:
        chats = format_input(list(prompts), system)
        found = processor.apply_chat_template(chats, add_generation_prompt=False, tokenize=True, return_dict=True)
        return [len(prompt) for prompt in found["input_ids"]]

    return LimitedEncoder(_tokens(pipeline, tokens), PromptLimit(tokens, lengths))


def _tokens(pipeline: Any, length: int) -> TextEncoder:
    return lambda prompts: {"tokens": pipeline.encode_prompt(list(prompts), max_sequence_length=length)[0]}
