"""What families do alike: drawing noise, shifting sigmas by resolution, and decoding by an `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor


def normal_latents(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal latents on the CPU, one seed an image: ``(len(seeds), *shape)`` float32."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def resolution_shift(config: Any, tokens: int) -> float:
    """``mu`` of the scheduler with this ``config`` for images of so many tokens."""
    shift: float = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    return shift


def decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents ``(B, C, H/8, W/8)`` in the transformer's scale to images ``(B, 3, H, W)``, about [0, 1], not clamped."""
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(scaled.to(vae.dtype), return_dict=False)[0].to(latents.dtype) / 2 + 0.5
