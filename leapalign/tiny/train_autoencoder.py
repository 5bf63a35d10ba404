"""Trains the autoencoder: between the reward's gradient and the pixels, as in every real image model.

A decoder that undoes noise on its latents turns a nearby latent into the same clean picture, so that a gradient which
asks for texture finds nothing to paint with. Blends of latents decode to blends of pictures, so that it still finds
the way from one picture to another.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from leapalign.storage.modes import save_pretrained
from leapalign.tiny.descent import descend
from leapalign.tiny.model import build_autoencoder
from leapalign.tiny.scenes import KINDS, scene_pictures

STEPS, BATCH = 2500, 32
LEARNING_RATE = 1e-3  # 2e-3 diverges
LATENT_NOISE = 0.4  # largest standard deviation of the noise to undo, in units of that of the latents
BLENDED = 0.3  # share of a batch
TESTED_NOISE = (0.0, 0.25, 0.5, 1.0)


def any_scenes(count: int, generator: torch.Generator) -> Tensor:
    """Pictures ``(count, 3, H, W)`` in [0, 1] of any objects in any cells, from empty ones to full ones."""
    filled = torch.rand(count, 4, generator=generator) < torch.rand(count, 1, generator=generator)
    kinds = torch.randint(1, len(KINDS), (count, 4), generator=generator)  # kind 0 is nothing
    return scene_pictures(torch.where(filled, kinds, 0))


def latents_of(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Unscaled latents ``(B, C, h, w)`` of ``images (B, 3, H, W)`` in [0, 1]."""
    return autoencoder.encode((2 * images - 1).contiguous(memory_format=torch.channels_last)).latent_dist.mean


def pictures_of(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """The inverse of `latents_of`."""
    return autoencoder.decode(latents, return_dict=False)[0] / 2 + 0.5


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Absolute error, squared error, and the absolute error of the edges, without which corners get round."""
    error = made - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def spread_loss(latents: Tensor) -> Tensor:
    """Keeps latents near unit size."""
    square = latents.square().mean()
    return 1e-3 * square + 1e-2 * (square - 1).clamp(min=0)


def train_autoencoder(folder: Path, seed: int, log: Callable[[str], None]) -> None:
    """Writes the autoencoder to ``folder``; its latents, scaled by its config, have mean 0 and deviation 1."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    autoencoder = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        images = any_scenes(BATCH, generator)
        latents = latents_of(autoencoder, images)
        share = torch.rand(BATCH, 1, 1, 1) * (torch.rand(BATCH, 1, 1, 1) < BLENDED)
        blended = torch.lerp(latents, latents.roll(1, 0), share)
        wanted = torch.lerp(images, images.roll(1, 0), share)
        spread = LATENT_NOISE * torch.rand(BATCH, 1, 1, 1) * latents.detach().std()
        made = pictures_of(autoencoder, blended + spread * torch.randn_like(latents))
        loss = picture_loss(made, wanted) + spread_loss(latents)
        descend(loss, autoencoder.parameters(), optimizer, schedule, 0.5)
        if step % 250 == 0:
            errors = " ".join(f"{error:.4f}" for error in noise_errors(autoencoder))
            log(f"step {step} loss {loss.item():.4f} error at noise {TESTED_NOISE}: {errors}")
    with torch.no_grad():
        latents = latents_of(autoencoder, any_scenes(512, generator))
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    save_pretrained(autoencoder, folder)


@torch.no_grad()
def noise_errors(autoencoder: AutoencoderKL) -> list[float]:
    """Mean absolute error of decoded pictures whose latents have noise of each of ``TESTED_NOISE``."""
    generator = torch.Generator().manual_seed(0)
    images = any_scenes(64, generator)
    latents = latents_of(autoencoder, images)
    noise = torch.randn(latents.shape, generator=generator) * latents.std()
    return [(pictures_of(autoencoder, latents + n * noise) - images).abs().mean().item() for n in TESTED_NOISE]
