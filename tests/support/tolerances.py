"""How far a result may be from the exact one: derived from rounding, not tuned until tests pass.

`u` is the unit roundoff of a dtype, half its eps: rounding to nearest is off by at most `u |value|`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype the ops compute in, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def elementwise(exact: Tensor, magnitude: Tensor, dtype: torch.dtype, operations: int, cut: bool = False) -> Tensor:
    """Bound the error of `operations` roundings in the ops' arithmetic, and one to the storage `dtype`.

    `magnitude` bounds every intermediate value, elementwise. `cut` allows a final rounding towards zero, off
    by twice as much: this is how Triton's interpreter (not its compiler) stores bfloat16.
    """
    inner = operations * unit_roundoff(_arithmetic(dtype)) * magnitude
    outer = (2 if cut else 1) * unit_roundoff(dtype) * (exact.abs() + inner)
    return inner + outer + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def reduction(magnitude: Tensor, count: int, dtype: torch.dtype, operations: int) -> Tensor:
    """Bound the error of a mean or norm over `count` terms, each `operations` roundings away from exact.

    `magnitude` is the mean (or norm) of the terms' intermediate magnitudes. Adding one by one, the roundings
    make a random walk of length `count`; every implementation here adds in shorter chains.
    """
    return (operations + count**0.5) * unit_roundoff(_arithmetic(dtype)) * magnitude


def largest(
    exact: Tensor, magnitude: float, count: int, dtype: torch.dtype, stored: torch.dtype
) -> tuple[float, float]:
    """Bound the largest error of a whole result: by the ops' arithmetic alone, and by storing it in `stored`.

    `magnitude` bounds every intermediate value. Ten roundings are more than any op takes for an element; `count` is
    how many of them a reduction adds up.
    """
    size = max(magnitude, exact.abs().max().item())
    arithmetic = (10 + count**0.5) * unit_roundoff(_arithmetic(dtype)) * size
    return arithmetic, unit_roundoff(stored) * exact.abs().max().item() + torch.finfo(stored).tiny
