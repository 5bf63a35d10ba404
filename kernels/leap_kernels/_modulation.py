"""What ops on the stream of a transformer block accept: rows (B, ..., C), and a vector of C numbers for each sample.

Sums over the rows of a sample are made in two stages: each program sums a strip of rows, then the strips are added.
So they have the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import FLOATS

STRIP = 4
"""Rows of a program that sums nothing over rows."""
SUMMED_STRIP = 64
"""Most rows of a program that does: what it writes to be added later is then little beside what it reads."""
_FEWEST_ROWS = 16
_PROGRAMS = 256
"""Enough to keep a GPU busy."""


def summed_strip(batch: int, rows: int, programs_of_strip: int = 1) -> int:
    """Return the rows of a program that sums over rows: fewer of a small tensor, whose programs would be too few."""
    return SUMMED_STRIP if batch * rows * programs_of_strip >= SUMMED_STRIP * _PROGRAMS else _FEWEST_ROWS


def check_rows(op: str, x: Tensor, other_name: str = "", other: Tensor | None = None) -> None:
    """Check that `x` is (B, ..., C) with at least one element, and that `other`, if given, is like it.

    Raises:
        ValueError: on a wrong dtype, fewer than two dimensions, no element, or another shape or device.
    """
    if x.dtype not in FLOATS or (other is not None and other.dtype not in FLOATS):
        wrong = x.dtype if other is None else f"{x.dtype} and {other.dtype}"
        raise ValueError(f"{op} takes float32, bfloat16, float16 and float64, not {wrong}.")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{op} needs x of shape (B, ..., C) with at least one element, not {tuple(x.shape)}.")
    if other is not None and (other.shape != x.shape or other.device != x.device):
        raise ValueError(
            f"{op} needs x and {other_name} alike, but x is {tuple(x.shape)} on {x.device} and {other_name} "
            f"{tuple(other.shape)} on {other.device}."
        )


def check_vector(op: str, name: str, vector: Tensor, x: Tensor) -> None:
    """Check that `vector` holds C numbers for each sample of `x` (B, ..., C).

    Raises:
        ValueError: on a wrong dtype or device, or a shape other than (B, C) and (B, 1, ..., C).
    """
    shape, rows = vector.shape, x.shape
    if len(shape) < 2 or shape[0] != rows[0] or shape[-1] != rows[-1] or vector.numel() != shape[0] * shape[-1]:
        raise ValueError(
            f"{op} needs {name} of shape ({x.shape[0]}, {x.shape[-1]}), or with ones in between, for x of shape "
            f"{tuple(x.shape)}, not {tuple(shape)}. For a {name} of each token, make the tokens the batch."
        )
    if vector.dtype not in FLOATS or vector.device != x.device:
        raise ValueError(
            f"{op} needs {name} as float32, bfloat16, float16 or float64 on {x.device}, not {vector.dtype} on "
            f"{vector.device}."
        )


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Return batch, rows of a sample and width of `x` (B, ..., C)."""
    batch, *_, width = x.shape
    return batch, x.numel() // (batch * width), width


def in_rows(x: Tensor) -> Tensor:
    """Reshape (B, ..., C) to (B, rows, C)."""
    return x.reshape(sizes(x))


def strided(vector: Tensor) -> tuple[Tensor, int]:
    """Return a vector for each sample and the elements between them; a chunk of a wider tensor is not copied."""
    strides = vector.stride()
    if strides[-1] != 1 and vector.shape[-1] > 1:
        vector = vector.contiguous()
        strides = vector.stride()
    return vector, strides[0]


def like_vector(vector: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty gradient of a vector, contiguous."""
    return torch.empty_like(vector, dtype=dtype, memory_format=torch.contiguous_format)


def nothing(like: Tensor) -> Tensor:
    """Return the empty tensor that stands for a gradient nobody asked for: an op has to return one."""
    return like.new_empty(0)
