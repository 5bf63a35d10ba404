"""The files of a checkpoint, and damage done to them."""

from __future__ import annotations

from pathlib import Path

FILES = (
    "manifest.json",
    "optimizer.safetensors",
    "state.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer_ema/config.json",
    "transformer_ema/diffusion_pytorch_model.safetensors",
)


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
