"""Active sets of FlowBP (arXiv 2606.11075): late-biased draws, and coefficients scaled up for the steps left out."""

from __future__ import annotations

import torch
from torch import Tensor

from leapalign.methods.base import wide


def draw_without_replacement(weight: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """Steps drawn one after the other, each with probability proportional to its weight among those left.

    weight: ``(B, T)``, 0 for steps that cannot be drawn; count: ``(B,)``. Returns ``(max count, B)`` int64, each
    column ascending, filled up with -1.
    """
    # The smallest of exponential variables with these rates (Efraimidis and Spirakis, 2006).
    time = -torch.rand(weight.shape, generator=generator, dtype=torch.float64).log() / weight
    chosen = time.argsort(dim=1).argsort(dim=1) < count[:, None]
    steps = torch.arange(weight.shape[1]).where(chosen, weight.shape[1]).sort(dim=1).values.T[: int(count.max())]
    return steps.where(steps < weight.shape[1], -1)


def length(sigmas: Tensor, window: range) -> Tensor:
    """How far sigma falls over the steps of ``window``, ``()``."""
    return wide(sigmas).diff()[window.start : window.stop].abs().sum()


def rescaled(coefficient: Tensor, total: Tensor, strength: float) -> Tensor:
    """``coefficient (K, N)`` times ``1 + strength (total / sum_k |coefficient_k| - 1)``; total: ``(N,)`` or ``()``."""
    return coefficient * (1 + strength * (total / coefficient.abs().sum(dim=0) - 1))
