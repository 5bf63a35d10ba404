"""Unbiased rounding of float32 to bfloat16, in place, with counter-based random bits.

    dst_i = src_i rounded up in magnitude with probability (src_i - below_i) / (above_i - below_i), else down

`below_i` and `above_i` are the bfloat16 neighbours of src_i, so the expectation of dst_i is src_i. A bfloat16
is the upper half of a float32: adding 16 random bits to the lower half and cutting it off does this, because
the carry out of the lower half happens with just that probability.

The bits of element i are the low 16 of the first word of Philox4x32-10 (Salmon et al., 2011) with the seed as
key and `offset + i` as counter, so they depend on nothing else: not on the backend, the device, or how a
tensor is cut up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import choose, only_reference, register

_OP = register("stochastic_round_", only_reference)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# The generator needs some ten int64 temporaries; pieces keep them in cache and off the memory peak.
_PIECE = 1 << 18


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-10; a word is an int64 tensor with values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a 32 x 32 bit product, by halves: 64 signed bits cannot hold it."""
    lower = multiplier * (word & 0xFFFF)
    upper = multiplier * (word >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def reference(src: Tensor, seed: int, offset: int) -> Tensor:
    """Round a flat float32 tensor to bfloat16 in plain PyTorch; its first element has counter `offset`."""
    position = torch.arange(src.numel(), dtype=torch.int64, device=src.device) + offset
    zero = torch.zeros_like(position)
    words = philox((position & _MASK, position >> 32, zero, zero), (seed & _MASK, seed >> 32))
    bits = src.view(torch.int32).to(torch.int64)
    rounded = bits + (words[0] & 0xFFFF)
    # Above the largest bfloat16 the upper neighbour is infinity: a finite value stays finite instead.
    overflows = (rounded & 0x7F800000) == 0x7F800000
    upper_half = torch.where(overflows, bits, rounded) >> 16
    result = upper_half.to(torch.int16).view(torch.bfloat16)
    return torch.where(src.isfinite(), result, src.to(torch.bfloat16))


@torch.no_grad()
def stochastic_round_(dst: Tensor, src: Tensor, seed: int, offset: int) -> Tensor:
    """Write `src`, rounded stochastically to bfloat16, into `dst`, and return `dst`.

    The expectation of the result is `src`. A value that bfloat16 holds exactly is never changed; inf and nan
    stay (a nan may lose its payload), and a finite value never becomes infinite. The bits drawn for element i
    (in row-major order) depend on `seed` and `offset + i` alone: the same two give the same result on every
    backend, and offsets that differ by at least the number of elements give independent draws.

    Args:
        dst: bfloat16, any shape; any strides under which no two elements share memory.
        src: float32, shape and device of `dst`, any strides.
        seed: 0 <= seed < 2^64.
        offset: 0 <= offset, and offset + elements <= 2^63.

    Returns:
        `dst`.

    Raises:
        ValueError: on a wrong dtype, shape or device, overlapping `dst`, or a seed or offset out of range.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    _check(dst, src, seed, offset)
    choose(_OP, dst, src)
    flat = src.detach().reshape(-1)
    pieces = [reference(piece, seed, offset + start * _PIECE) for start, piece in enumerate(flat.split(_PIECE))]
    return dst.copy_(torch.cat(pieces).view(dst.shape))


def _check(dst: Tensor, src: Tensor, seed: int, offset: int) -> None:
    if dst.dtype != torch.bfloat16 or src.dtype != torch.float32:
        raise ValueError(f"stochastic_round_ rounds float32 to bfloat16, not {src.dtype} to {dst.dtype}.")
    if dst.shape != src.shape or dst.device != src.device:
        raise ValueError(
            f"stochastic_round_ needs dst and src alike, but dst is {tuple(dst.shape)} on {dst.device} and "
            f"src {tuple(src.shape)} on {src.device}."
        )
    if any(stride == 0 and size > 1 for stride, size in zip(dst.stride(), dst.shape, strict=True)):
        raise ValueError("stochastic_round_ cannot write to an expanded dst: its elements share memory.")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"stochastic_round_ needs a seed in [0, 2^64), not {seed}.")
    if not 0 <= offset <= (1 << 63) - max(1, src.numel()):
        raise ValueError(f"stochastic_round_ needs an offset in [0, 2^63 - elements], not {offset}.")
