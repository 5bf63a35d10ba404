"""Z-Image: prompts of their own lengths, time that runs from noise (0) to image (1), velocities that point there.

The pipeline's ``guidance_scale`` s adds to the prompt's velocity, ``v_prompt + s (v_prompt - v_negative)``; that is
``true_cfg_scale = 1 + s`` here, and the published 4 is 5. The pipeline's ``cfg_normalization`` is left off, as its
default is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from torch.nn.functional import pad

from leapalign.config import ModelConfig, SigmaSpacing
from leapalign.inputs.prompt_limits import PromptLimit
from leapalign.inputs.validation import UserError
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.folder import Parts
from leapalign.models.latents import decoded, normal_latents, resolution_shift
from leapalign.models.text_encoders import LimitedEncoder, Residence, TextEncoder, chat_text, loaded_in_turn
from leapalign.models.text_length import TextLength


class ZImageModel:
    """One Z-Image model for images of ``height x width`` pixels.

    Latents are ``(B, C, H/8, W/8)``, 8 being the VAE's factor. Raises UserError for a size that does not divide into
    tokens.
    """

    text_length = TextLength(default=512, longest=512)

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        height: int,
        width: int,
        tokens: int = text_length.default,
    ) -> None:
        self.transformer = transformer.eval()
        self.scheduler = scheduler
        # Trained through, never itself.
        self.decoder = vae.eval().requires_grad_(False)
        self.device, self.tokens = torch.device("cpu"), tokens
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        # A token is 2x2 latents.
        if height % (2 * factor) or width % (2 * factor):
            raise UserError(f"model.height {height} and model.width {width} must be multiples of {2 * factor}")
        self.rows, self.columns = height // factor, width // factor

    @classmethod
    def assemble(cls, parts: Parts, config: ModelConfig) -> ZImageModel:
        """The model of ``parts``. Raises UserError where one cannot be read."""
        return cls(
            parts.part(ZImageTransformer2DModel, "transformer"),
            parts.part(FlowMatchEulerDiscreteScheduler, "scheduler"),
            parts.part(AutoencoderKL, "vae"),
            config.height,
            config.width,
            cls.text_length.of(config.max_sequence_length),
        )

    @staticmethod
    def text_encoders(folder: str, residence: Residence, tokens: int) -> Iterator[TextEncoder]:
        """Qwen3's, for ``tokens (B, L, D)`` and, of these, how many belong to the prompt: ``lengths (B,)`` int64."""
        encoders = [(("text_encoder", "tokenizer"), functools.partial(_tokens, tokens))]
        return loaded_in_turn(ZImagePipeline, folder, encoders, residence)

    def blank_embeddings(self, count: int, tokens: int) -> PromptEmbeddings:
        """Embeddings of nothing for ``count`` prompts, as long as those of a tokenizer that allows ``tokens``.

        Without ``lengths``: all are as long as they can be.
        """
        width = self.transformer.config.cap_feat_dim
        return PromptEmbeddings({"tokens": torch.zeros(count, min(tokens, self.tokens), width)})

    def draw_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents, one seed an image: ``(len(seeds), C, H/8, W/8)`` float32."""
        shape = (self.transformer.config.in_channels, self.rows, self.columns)
        return normal_latents(seeds, shape).to(self.device)

    def sigmas(self, num_steps: int, spacing: SigmaSpacing = "pipeline") -> Tensor:
        """The scheduler's noise levels ``(num_steps + 1,)``, for this resolution where they depend on it.

        The pipeline's are linear.
        """
        shift = resolution_shift(self.scheduler.config, (self.rows // 2) * (self.columns // 2))
        self.scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(num_steps), mu=shift)
        return self.scheduler.sigmas.clone()

    def velocity(self, latents: Tensor, sigma: Tensor, embeddings: PromptEmbeddings) -> Tensor:
        """``latents (B, C, H/8, W/8)``, per-sample ``sigma (B,)`` -> velocity of the same shape."""
        device, dtype = latents.device, self.transformer.dtype
        steps = self.scheduler.config.num_train_timesteps
        # The transformer's images have frames, of which these have one.
        images = latents.to(dtype).unsqueeze(2)
        predicted = self.transformer(
            list(images.unbind()),
            # 1 - sigma, rounded as the pipeline does.
            (steps - steps * sigma.to(device)) / steps,
            [prompt.to(device, dtype) for prompt in _prompts(embeddings)],
            return_dict=False,
        )[0]
        return -torch.stack(predicted).squeeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images ``(B, 3, H, W)``; about [0, 1], not clamped."""
        return decoded(self.decoder, latents)


def _prompts(embeddings: PromptEmbeddings) -> list[Tensor]:
    """Each prompt's tokens, ``(its length, D)``."""
    tokens = embeddings.parts["tokens"]
    if "lengths" not in embeddings.parts:
        return list(tokens)
    return [prompt[:length] for prompt, length in zip(tokens, embeddings.known("lengths").tolist(), strict=True)]


def _tokens(tokens: int, pipeline: Any) -> TextEncoder:
    length = min(tokens, pipeline.tokenizer.model_max_length)

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        found, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
        return {
            "tokens": torch.stack([pad(prompt, (0, 0, 0, length - len(prompt))) for prompt in found]),
            "lengths": torch.tensor([len(prompt) for prompt in found]),
        }

    text = chat_text(pipeline.tokenizer, enable_thinking=True)
    return LimitedEncoder(encode, PromptLimit.of(pipeline.tokenizer, length, text))
