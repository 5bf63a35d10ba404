"""What families do alike: drawing noise, shifting sigmas by resolution, telling time, and decoding by an
`AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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


def linear_sigmas(scheduler: Any, num_steps: int, shift: float) -> Tensor:
    """The ``scheduler``'s noise levels ``(num_steps + 1,)``: 1 to ``1 / num_steps`` evenly, shifted, and 0.

    shift: ``mu``, of schedulers whose shift depends on the resolution.
    """
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps), mu=shift)
    levels: Tensor = scheduler.sigmas
    return levels.clone()


def rounded_time(scheduler: Any, sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """``sigma (B,)`` in ``dtype``, as pipelines of diffusers have it that round a timestep before they divide by 1000.

    In bfloat16 it is not ``sigma`` rounded: of FLUX.1's 25 steps 6 differ at 720 pixels and 10 at 1024,
    by a unit in the last place.
    """
    return (sigma * scheduler.config.num_train_timesteps).to(dtype) / 1000


def decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents ``(B, C, H/8, W/8)`` in the transformer's scale to images ``(B, 3, H, W)``, about [0, 1], not clamped."""
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(scaled.to(vae.dtype), return_dict=False)[0].to(latents.dtype) / 2 + 0.5
