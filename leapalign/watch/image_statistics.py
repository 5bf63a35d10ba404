"""What reward hacking does to images, as numbers: of ``images (B, 3, H, W)`` in [0, 1], all float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

EDGE = 0.1
"""Change of luminance from one pixel to the next that counts as an edge."""
SMALL_SIDE = 32
"""Pixels; what is compared between images is seen at this size."""


def saturation(images: Tensor) -> Tensor:
    """``mean_xy (max_c I - min_c I)``, ``(B,)``: 0 for grey, 1 for pure colours.

    Not divided by ``max_c I`` as in HSV, where the noise of black pixels would count as colour.
    """
    images = images.float()
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def sharpness(images: Tensor) -> Tensor:
    """``var_xy (Y(x-1, y) + Y(x+1, y) + Y(x, y-1) + Y(x, y+1) - 4 Y(x, y))`` of the luminance Y, ``(B,)``."""
    y = _luminance(images)
    neighbours = y[:, 1:-1, :-2] + y[:, 1:-1, 2:] + y[:, :-2, 1:-1] + y[:, 2:, 1:-1]
    return (neighbours - 4 * y[:, 1:-1, 1:-1]).var((1, 2), correction=0)


def edge_density(images: Tensor) -> Tensor:
    """``mean_xy [|grad Y| > EDGE]`` with central differences of the luminance Y, ``(B,)``: the share of edges."""
    y = _luminance(images)
    across = (y[:, 1:-1, 2:] - y[:, 1:-1, :-2]) / 2
    down = (y[:, 2:, 1:-1] - y[:, :-2, 1:-1]) / 2
    return (torch.hypot(across, down) > EDGE).float().mean((1, 2))


def small(images: Tensor) -> Tensor:
    """Means over squares: at most `SMALL_SIDE` pixels high and wide, ``(B, 3, h, w)``."""
    height, width = (min(side, SMALL_SIDE) for side in images.shape[-2:])
    return adaptive_avg_pool2d(images.float(), (height, width))


def diversity(smalls: Tensor) -> Tensor:
    """``mean_{s<t} rms(I_s - I_t)`` over pairs of each prompt's `small` images ``(P, S, 3, h, w)``, ``(P,)``.

    They are small so that grain, which differs from seed to seed, does not pass for other pictures.
    """
    flat = smalls.flatten(2)
    distances = [(flat[:, apart:] - flat[:, :-apart]).square().mean(2).sqrt() for apart in range(1, flat.shape[1])]
    return torch.cat(distances, dim=1).mean(1)


def drift(latents: Tensor, base: Tensor) -> Tensor:
    """``|x - x_base| / |x_base|``, ``(B,)``, for latents ``(B, ...)`` that both came from the same noise."""
    change = (latents.float() - base.float()).flatten(1).norm(dim=1)
    return change / base.float().flatten(1).norm(dim=1)


def _luminance(images: Tensor) -> Tensor:
    """``(B, H, W)``, as in Rec. 601."""
    red, green, blue = images.float().unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
