"""The step that all trainings of the tiny world take."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler


def descend(
    loss: Tensor,
    weights: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    longest: float = 1.0,
) -> None:
    """One optimizer step down the gradient of ``loss``, which is clipped to the norm ``longest``."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, longest)
    optimizer.step()
    schedule.step()
