"""Images as reward models want them, differentiably: what their own transforms do to 8-bit pictures, on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.memory.constants import made_there
from leapalign.reward_gradient import to_unit_range

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that OpenAI's CLIP was trained on; all its descendants use them."""


def resize(images: Tensor, height: int, width: int, clip: bool = True) -> Tensor:
    """``images (B, 3, H, W)`` in [0, 1] at another size, bicubic and antialiased as PIL does it, in float32 or wider.

    Two matrix products: the backward pass of `torch.nn.functional.interpolate` adds by atomics on a GPU, in an order of
    the moment. clip: overshoot is clipped, as 8-bit pictures clip it, but keeps its gradient.
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    rows, columns = (_bicubic(*sizes, wide) for sizes in zip(images.shape[-2:], (height, width), strict=True))
    resized = (rows @ (wide @ columns.mT)).to(images.dtype)
    return to_unit_range(resized) if clip else resized


def _bicubic(size: int, new_size: int, like: Tensor) -> Tensor:
    """``(new_size, size)``: how much of each pixel of a line goes into each new one, in the dtype and on the device of
    ``like``; Keys' cubic with a = -1/2, as wide as the larger of the two pixels."""
    # Made where it is used, as a copy from host memory would have the host wait.
    new, old = (torch.arange(n, dtype=torch.float64, device=like.device) + 0.5 for n in (new_size, size))
    scale = size / new_size
    distance = (old - scale * new.unsqueeze(1)).abs() / max(scale, 1.0)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return (weights / weights.sum(dim=1, keepdim=True)).to(like.dtype)


def cover(images: Tensor, side: int, centre: Callable[[float], int] = math.floor) -> Tensor:
    """``(B, 3, side, side)``: short side to ``side``, then the centre of the long one (CLIP's transform).

    centre: of half an odd margin, the pixels that are cut off first. transformers takes the floor, torchvision Python's
    `round`, which goes to the even one.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resize(images, side * height // short, side * width // short)
    top, left = (centre((length - side) / 2) for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def contain(images: Tensor, side: int, clip: bool = True) -> Tensor:
    """``(B, 3, side, side)``: long side to ``side``, then black on both sides of the short one (HPSv2's transform).

    clip: as of `resize`.
    """
    scale = side / max(images.shape[-2:])
    height, width = (max(1, round(size * scale)) for size in images.shape[-2:])
    images = resize(images, height, width, clip=clip)
    high, wide = side - images.shape[-2], side - images.shape[-1]
    return F.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


def normalised(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """``(images - mean) / std``, channel by channel."""
    shift, scale = (made_there(values, images).view(3, 1, 1) for values in (mean, std))
    return (images - shift) / scale


def unit_vectors(features: Tensor) -> Tensor:
    """``features (B, D)`` at length 1, in float32 or wider."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
