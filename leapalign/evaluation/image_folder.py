"""Generated images on disk, written as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from leapalign.reports.pictures import image_grid, to_picture

IN_GRID = 24
"""Images, the first ones: a grid of all would have to hold all."""


def save_images(batches: Iterable[Tensor], prompts: Sequence[str], files: Sequence[Path], folder: Path) -> None:
    """Writes image i of ``batches`` of ``(B, 3, H, W)`` to ``files[i]``, and a grid of the first to ``folder``."""
    shown: list[Tensor] = []
    left = iter(files)
    for images in batches:
        shown += images[: IN_GRID - len(shown)]
        for image in images:
            to_picture(image, image.shape[-1]).save(next(left))
    image_grid(torch.stack(shown), prompts[: len(shown)]).save(folder / "grid.png")
