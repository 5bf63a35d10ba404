"""FLUX.1: packed latents in, velocity out; sigmas, guidance and latent scaling from the model's own configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from leapalign.validation import UserError, brief


@dataclass(frozen=True)
class PromptEmbeddings:
    """``tokens (B, L, D)`` for attention and ``pooled (B, P)`` for modulation."""

    tokens: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, samples: Tensor | slice) -> PromptEmbeddings:
        return PromptEmbeddings(self.tokens[samples], self.pooled[samples])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.tokens, self.pooled

    def followed_by(self, other: PromptEmbeddings) -> PromptEmbeddings:
        """These, then those of ``other``."""
        return PromptEmbeddings(torch.cat([self.tokens, other.tokens]), torch.cat([self.pooled, other.pooled]))


@torch.no_grad()
def encode_prompts(folder: str, prompts: Sequence[str], batch_size: int = 64) -> PromptEmbeddings:
    """Embeddings of ``prompts`` by the text encoders of the FLUX.1 model in ``folder`` (or hub id).

    Raises UserError where the folder has no usable text encoders.
    """
    try:
        pipeline = FluxPipeline.from_pretrained(folder, transformer=None, vae=None)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load text encoders from '{folder}' ({brief(error)}); check model.path") from None
    length = min(512, pipeline.tokenizer_2.model_max_length)
    parts = [
        pipeline.encode_prompt(list(prompts[i : i + batch_size]), None, max_sequence_length=length)[:2]
        for i in range(0, len(prompts), batch_size)
    ]
    return PromptEmbeddings(torch.cat([tokens for tokens, _ in parts]), torch.cat([pooled for _, pooled in parts]))


class FluxModel:
    """One FLUX.1 model for images of ``height x width`` pixels.

    Latents are packed, ``(B, tokens, channels)``, as the transformer takes them. Without a ``vae`` the latents are
    pixels: the decoder only unpacks them. Raises UserError for a size that does not divide into tokens.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        height: int,
        width: int,
        vae: AutoencoderKL | None = None,
        guidance: float = 3.5,
    ) -> None:
        self.transformer = transformer.eval()
        self.scheduler = scheduler
        # Trained through, never itself.
        self.vae = vae.eval().requires_grad_(False) if vae else None
        self.guidance = guidance
        self.device = torch.device("cpu")
        # FLUX packs 2x2 latents into a token; without a VAE, a latent is itself 2x2 pixels.
        pixels_per_token = 2 * (2 ** (len(vae.config.block_out_channels) - 1) if vae else 2)
        if height % pixels_per_token or width % pixels_per_token:
            raise UserError(f"model.height {height} and model.width {width} must be multiples of {pixels_per_token}")
        self.rows, self.columns = height // pixels_per_token, width // pixels_per_token

    @property
    def decoder(self) -> AutoencoderKL | None:
        return self.vae

    @classmethod
    def load(
        cls, folder: str | Path, height: int, width: int, guidance: float = 3.5, dtype: torch.dtype = torch.float32
    ) -> FluxModel:
        """Loads ``transformer/``, ``scheduler/`` and, where there is one, ``vae/`` of a FLUX.1 folder or hub id.

        Raises UserError where they cannot be read.
        """
        has_vae = (Path(folder) / "vae").is_dir() or not Path(folder).is_dir()
        try:
            transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
            vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype) if has_vae else None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load a FLUX.1 model from '{folder}' ({brief(error)}); check model.path") from None
        return cls(transformer, scheduler, height, width, vae, guidance)

    def draw_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents, one seed an image: ``(len(seeds), tokens, channels)`` float32."""
        shape = (self.rows * self.columns, self.transformer.config.in_channels)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise).to(self.device)

    def sigmas(self, num_steps: int) -> Tensor:
        """The scheduler's noise levels ``(num_steps + 1,)`` for this resolution, ending at 0."""
        config = self.scheduler.config
        shift = calculate_shift(
            self.rows * self.columns,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        levels = np.linspace(1.0, 1.0 / num_steps, num_steps)
        self.scheduler.set_timesteps(sigmas=levels, mu=shift)
        return self.scheduler.sigmas.clone()

    def velocity(self, latents: Tensor, sigma: Tensor, embeddings: PromptEmbeddings) -> Tensor:
        """``latents (B, tokens, channels)``, per-sample ``sigma (B,)`` -> velocity of the same shape.

        Guidance goes in as an embedding where the model was distilled for it.
        """
        device, dtype = latents.device, self.transformer.dtype
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(latents),), self.guidance, device=device, dtype=dtype)
        return self.transformer(
            hidden_states=latents.to(dtype),
            timestep=sigma.to(device, dtype),
            guidance=guidance,
            pooled_projections=embeddings.pooled.to(device, dtype),
            encoder_hidden_states=embeddings.tokens.to(device, dtype),
            txt_ids=torch.zeros(embeddings.tokens.shape[1], 3, device=device, dtype=dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(len(latents), self.rows, self.columns, device, dtype),
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Packed latents to images ``(B, 3, H, W)``; about [0, 1], not clamped."""
        batch, _, channels = latents.shape
        unpacked = latents.view(batch, self.rows, self.columns, channels // 4, 2, 2)
        unpacked = unpacked.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * self.rows, 2 * self.columns)
        if self.vae is None:
            pixels = torch.nn.functional.pixel_shuffle(unpacked, 2)
        else:
            config = self.vae.config
            scaled = unpacked / config.scaling_factor + config.shift_factor
            pixels = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].to(latents.dtype)
        return pixels / 2 + 0.5
