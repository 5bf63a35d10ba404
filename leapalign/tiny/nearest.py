"""What a picture is worth for a prompt, by its distance to the nearest scene that satisfies it.

This is what the trained reward learns, value and gradient: every way to a better scene is uphill, and everything
else, from a stain to a fifth object, is downhill.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from leapalign.rewards.preprocessing import cover
from leapalign.tiny.scenes import kind_pictures, satisfying_scenes, scene_pictures
from leapalign.tiny.world import CELL_SIZE, IMAGE_SIZE, prompts_by_text

SIDE = IMAGE_SIZE // 2  # distances are taken on pictures of half the size
CELL = CELL_SIZE // 2
FALL = 40.0  # squared distance; another colour is about 70, another shape 45, one object more or less 50 to 135


@functools.cache
def small_kinds() -> Tensor:
    """`kind_pictures` at half size: ``(K, 3, CELL, CELL)``."""
    scenes = torch.arange(len(kind_pictures()))[:, None].expand(-1, 4)
    return cover(scene_pictures(scenes), SIDE)[..., :CELL, :CELL].contiguous()


def distances(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``(B,)``: squared distance of ``images (B, 3, SIDE, SIDE)`` to the nearest scene that satisfies its prompt."""
    cells = torch.stack([part for row in images.split(CELL, dim=2) for part in row.split(CELL, dim=3)], dim=1)
    to_kinds = (cells[:, :, None] - small_kinds()).square().sum(dim=(-1, -2, -3))  # (B, 4, K)
    place = torch.arange(4)
    nearest = [
        to_kind[place, satisfying_scenes(prompts_by_text()[prompt])].sum(dim=-1).min()
        for to_kind, prompt in zip(to_kinds, prompts, strict=True)
    ]
    return torch.stack(nearest)


def worth(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``exp(-distance / FALL)``, ``(B,)`` in (0, 1]: 1 for a scene that satisfies its prompt."""
    return torch.exp(-distances(images, prompts) / FALL)
