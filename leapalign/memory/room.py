"""Too little memory, told before the run where its rollouts alone need more."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.config import Config
from leapalign.inputs.validation import UserError


def require_room(config: Config, draw_noise: Callable[[list[int]], Tensor], device: torch.device) -> None:
    """Raises UserError where the latents and velocities of one rollout are more than all memory of ``device``.

    draw_noise: makes the latents of images from their seeds. What fits by this measure may still be too much:
    `leapalign memory` says what an iteration takes.
    """
    images, steps = min(config.rollout.batch_size, config.train.batch_size), config.rollout.num_steps
    with FakeTensorMode():  # which takes no memory
        latent = draw_noise([0])
    needed = images * (2 * steps + 1) * latent.numel() * latent.element_size()
    there = _total(device)
    if there is not None and needed > there:
        raise UserError(
            f"the latents of {images:,} images in {steps:,} steps take {needed / 2**30:,.1f} GiB, and there are "
            f"{there / 2**30:,.1f} GiB of memory; lower rollout.batch_size or rollout.num_steps"
        )


def _total(device: torch.device) -> int | None:
    """Bytes of memory; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
