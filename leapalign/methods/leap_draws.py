"""How leaps are drawn: where each starts, among the steps of a trajectory or of a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class LeapOptions(Protocol):
    """What strategies need to know of a method."""

    @property
    def leaps(self) -> int: ...
    @property
    def gap(self) -> int: ...
    @property
    def concentration(self) -> tuple[float, ...]: ...


def uniform_starts(num_steps: int, leaps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """``leaps`` distinct steps below ``num_steps``, every set equally likely: ``(leaps, B)`` int64, ascending.

    Raises ValueError where there are fewer steps than leaps.
    """
    if num_steps < leaps:
        raise ValueError(f"{leaps} leaps need at least {leaps} sampling steps to start from, got {num_steps}")
    order = torch.rand(batch_size, num_steps, generator=generator).argsort(dim=1)
    return order[:, :leaps].sort(dim=1).values.T


def dirichlet_starts(
    concentration: tuple[float, ...], num_steps: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """The last step of each part but the last, ``(parts - 1, B)`` int64: so the last leap has two steps at least.

    A part has its Dirichlet share of the steps, rounded, and at least one; what rounding leaves over or takes too much
    goes to the largest share, and what the least of one takes, to the longest part. Raises ValueError where there are
    fewer steps than leaps.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    shares = torch.from_numpy(np.random.default_rng(seed).dirichlet(concentration, size=batch_size))
    lengths = (shares * num_steps).round().long()
    lengths.scatter_add_(1, shares.argmax(dim=1, keepdim=True), num_steps - lengths.sum(dim=1, keepdim=True))
    lengths.clamp_(min=1)
    lengths.scatter_add_(1, lengths.argmax(dim=1, keepdim=True), num_steps - lengths.sum(dim=1, keepdim=True))
    return _apart(lengths.cumsum(dim=1)[:, :-1].T - 1, num_steps)


def uniform(options: LeapOptions, num_steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Distinct steps, every set equally likely (LeapAlign)."""
    return uniform_starts(num_steps, options.leaps, batch_size, generator)


def fixed_gap(options: LeapOptions, num_steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """A first start at random, the others ``gap`` steps apart (LeapAlign's ablation)."""
    room = num_steps - options.gap * (options.leaps - 1)
    if room < 1:
        raise ValueError(
            f"{options.leaps} leaps with gap {options.gap} need more than {num_steps} sampling steps to start from"
        )
    first = torch.randint(room, (batch_size,), generator=generator)
    return first + options.gap * torch.arange(options.leaps)[:, None]


def midpoint(options: LeapOptions, num_steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """A first start at random, each other half way from the one before to the end (FlowBP)."""
    starts = uniform_starts(num_steps - options.leaps + 1, 1, batch_size, generator)
    for _ in range(1, options.leaps):
        starts = torch.cat([starts, (starts[-1:] + num_steps) // 2])
    return _apart(starts, num_steps)


def dirichlet(options: LeapOptions, num_steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """The steps split by Dirichlet shares; each part but the last ends with a start (FlowBP)."""
    if len(options.concentration) != options.leaps + 1:
        raise ValueError(
            f"{options.leaps} leaps split the steps into {options.leaps + 1} parts, "
            f"but concentration has {len(options.concentration)} entries"
        )
    return dirichlet_starts(options.concentration, num_steps, batch_size, generator)


def _apart(starts: Tensor, num_steps: int) -> Tensor:
    """Moves starts ``(leaps, B)`` as little as makes them distinct, ascending and below ``num_steps``."""
    leaps = len(starts)
    if num_steps < leaps:
        raise ValueError(f"{leaps} leaps need at least {leaps} sampling steps to start from, got {num_steps}")
    moved: list[Tensor] = []
    for row, start in enumerate(starts):
        lowest = moved[-1] + 1 if moved else torch.zeros_like(start)
        moved.append(torch.maximum(start, lowest).clamp(max=num_steps - leaps + row))
    return torch.stack(moved)


STRATEGIES: dict[str, Callable[[LeapOptions, int, int, torch.Generator], Tensor]] = {
    "uniform": uniform,
    "fixed_gap": fixed_gap,
    "midpoint": midpoint,
    "dirichlet": dirichlet,
}
