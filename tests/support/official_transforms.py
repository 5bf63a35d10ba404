"""What reward models' libraries do to a picture, from the published formulas, on tensors: linear, so differentiable."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXELS = 256 * 28 * 28


def cubic(distance: float) -> float:
    """Keys' kernel with a = -1/2, PIL's ``BICUBIC``."""
    x = abs(distance)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0


@functools.cache
def weights(length: int, wanted: int) -> Tensor:
    """``(wanted, length)``, PIL's: the kernel is as many times wider as the picture becomes smaller."""
    step = length / wanted
    wide = max(step, 1)
    rows = torch.zeros(wanted, length, dtype=torch.float64)
    for row in range(wanted):
        centre = (row + 0.5) * step
        first, last = max(0, int(centre - 2 * wide + 0.5)), min(length, int(centre + 2 * wide + 0.5))
        rows[row, first:last] = torch.tensor([cubic((i + 0.5 - centre) / wide) for i in range(first, last)])
    return rows / rows.sum(dim=1, keepdim=True)


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """``images (B, 3, H, W)`` at another size; nothing is clipped."""
    down, across = (weights(*sizes).to(images) for sizes in ((images.shape[2], height), (images.shape[3], width)))
    return down @ images @ across.T


def normal(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def cropped(images: Tensor, side: int, centre: Callable[[float], int]) -> Tensor:
    """Short side to ``side``, and its centre. centre: ``round`` for torchvision, ``math.floor`` for transformers."""
    height, width = images.shape[2:]
    short = min(height, width)
    height, width = int(side * height / short), int(side * width / short)
    top, left = centre((height - side) / 2), centre((width - side) / 2)
    return resized(images, height, width)[:, :, top : top + side, left : left + side]


def padded(images: Tensor, side: int) -> Tensor:
    """HPSv2's ``ResizeMaxSize``: long side to ``side``, black around, the odd line at the end."""
    scale = side / max(images.shape[2:])
    height, width = (round(length * scale) for length in images.shape[2:])
    rows, columns = side - height, side - width
    around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return F.pad(resized(images, height, width), around)


def qwen_size(height: int, width: int, step: int = 28) -> tuple[int, int]:
    """Qwen2-VL's ``smart_resize`` to `PIXELS`."""
    rows, columns = round(height / step) * step, round(width / step) * step
    ratio = math.sqrt(height * width / PIXELS)
    if rows * columns > PIXELS:
        return (math.floor(height / ratio / step) * step, math.floor(width / ratio / step) * step)
    if rows * columns < PIXELS:
        return (math.ceil(height / ratio / step) * step, math.ceil(width / ratio / step) * step)
    return rows, columns


def qwen_patches(images: Tensor, patch: int = 14) -> tuple[Tensor, Tensor]:
    """Patches of 2 x 2 blocks, block after block, each twice in time, and the grid of each image."""
    height, width = qwen_size(*images.shape[2:])
    rows, columns = height // patch, width // patch
    order = [
        y * columns + x
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
        for y in (top, top + 1)
        for x in (left, left + 1)
    ]
    flat = F.unfold(normal(resized(images, height, width)), patch, stride=patch)[..., order].mT
    twice = flat.unflatten(2, (3, 1, patch * patch)).expand(-1, -1, -1, 2, -1)
    return twice.flatten(2).flatten(0, 1), torch.tensor([[1, rows, columns]] * len(images))
