"""Latent shapes and memory layouts the kernel tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = (
    "reference",
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
)
SHAPES = {
    "one-element": (1, 1),
    "scalar-samples": (5,),
    "prime": (3, 1009),
    "packed-image": (2, 81, 64),
    "longer-than-a-block": (2, 8192 + 17),
    "video": (2, 4, 3, 5, 7),
}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def latents(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal noise, rounded to `dtype`."""
    return torch.randn(shape, dtype=torch.float64).to(device(), dtype)


def sigmas(batch: int) -> tuple[Tensor, Tensor]:
    """Return per-sample noise levels, the first above the second."""
    levels = torch.rand(2, batch, device=device()).sort(dim=0, descending=True).values
    return levels[0], levels[1]


LAYOUTS = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "batch-last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}
