"""Unbiased rounding of float32 to bfloat16, in place, with counter-based random bits.

    dst_i = src_i rounded up in magnitude with probability (src_i - below_i) / (above_i - below_i), else down

`below_i` and `above_i` are the bfloat16 neighbours of src_i, so the expectation of dst_i is src_i. A bfloat16
is the upper half of a float32: adding 16 random bits to the lower half and cutting it off does this, because
the carry out of the lower half happens with just that probability.

The bits come from Philox4x32-7 (Salmon et al., 2011: 7 rounds are the fewest that pass BigCrush) with the seed as
key. A counter draws four words of 32 bits, the random bits of eight neighbours: element i has position p = offset + i,
counter p // 8 (the 64-bit number in the first two words of the counter, low word first; the others are 0), and the
half of word (p % 8) // 2 that p % 2 says: 0 the low one, 1 the high one. So the bits depend on seed and position
alone: not on the backend, the device, or how a tensor is cut up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._arguments import check_draws, check_writable
from ._dispatch import choose, register, unsupported
from ._library import define_in_place
from ._triton import jit, jit_for_any, tl, triton

PER_COUNTER = 8

# ---- reference ---------------------------------------------------------------------------------------------

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
# The generator needs some ten int64 temporaries; pieces keep them in cache and off the memory peak.
_PIECE = 1 << 18


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-7; a word is an int64 tensor with values in [0, 2^32)."""
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


def random_bits(count: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """Return the 16 random bits of `count` positions from `offset` on, as int64 (count,)."""
    first, skipped = divmod(offset, PER_COUNTER)
    counters = torch.arange(-(-(skipped + count) // PER_COUNTER), dtype=torch.int64, device=device) + first
    zero = torch.zeros_like(counters)
    words = philox((counters & _MASK, counters >> 32, zero, zero), (seed & _MASK, seed >> 32))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).view(-1)[skipped : skipped + count]


def reference_piece(src: Tensor, seed: int, offset: int) -> Tensor:
    """Round a flat float32 tensor to bfloat16 in plain PyTorch; its first element has position `offset`."""
    bits = src.view(torch.int32).to(torch.int64)
    rounded = bits + random_bits(src.numel(), seed, offset, src.device)
    # Above the largest bfloat16 the upper neighbour is infinity: a finite value stays finite, infinity is cut.
    overflows = (rounded & 0x7F800000) == 0x7F800000
    # A NaN could lose its last bit, or carry into the sign: its quiet bit keeps it.
    kept = torch.where(src.isnan(), bits | 0x400000, torch.where(overflows, bits, rounded))
    return (kept >> 16).to(torch.int16).view(torch.bfloat16)


def reference(dst: Tensor, src: Tensor, seed: int, offset: int) -> None:
    """Round contiguous `src` into contiguous `dst` in plain PyTorch."""
    for number, (to, piece) in enumerate(zip(dst.view(-1).split(_PIECE), src.view(-1).split(_PIECE), strict=True)):
        to.copy_(reference_piece(piece, seed, offset + number * _PIECE))


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def _words(seed, counters):  # type: ignore[no-untyped-def]
    zero = tl.zeros(counters.shape, dtype=tl.uint32)
    return tl.philox(seed, counters.to(tl.uint32), (counters >> 32).to(tl.uint32), zero, zero, 7)


@jit
def draw_eights(seed, counters):  # type: ignore[no-untyped-def]
    """Return the random bits of the eight positions of each counter, in order."""
    w0, w1, w2, w3 = _words(seed, counters)
    # (counter, word // 2, word % 2, half): row-major, this is the order of positions.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [8 * counters.shape[0]])


@jit
def draw_each(seed, positions):  # type: ignore[no-untyped-def]
    """Return the random bits of any positions, at eight times the cost."""
    w0, w1, w2, w3 = _words(seed, positions >> 3)
    within = positions & 7
    word = tl.where(within < 4, tl.where(within < 2, w0, w1), tl.where(within < 6, w2, w3))
    return tl.where(within & 1 == 0, word & 0xFFFF, word >> 16)


@jit
def round_off(values, random):  # type: ignore[no-untyped-def]
    """Round float32 to bfloat16 with 16 random bits each."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = bits + random
    kept = tl.where((rounded & 0x7F800000) == 0x7F800000, bits, rounded)
    kept = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, kept)
    return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


# Any number may come as seed or counter. Not so `skipped`: at 0, which divides by 16, addresses are aligned.
@jit_for_any("seed", "first")
def round_kernel(  # type: ignore[no-untyped-def]
    dst_ptr, src_ptr, seed: tl.uint64, first: tl.int64, skipped, count, BLOCK: tl.constexpr
):
    # 64 bits from here on: a tensor may exceed 2^31 elements.
    program = tl.program_id(0).to(tl.int64)
    random = draw_eights(seed, first + program * (BLOCK // 8) + tl.arange(0, BLOCK // 8))
    at = program * BLOCK + tl.arange(0, BLOCK) - skipped
    inside = (at >= 0) & (at < count)
    src = tl.load(src_ptr + at, mask=inside, other=0.0)
    tl.store(dst_ptr + at, round_off(src, random), mask=inside)


def triton_round(dst: Tensor, src: Tensor, seed: int, offset: int) -> None:
    """Round contiguous `src` into contiguous `dst` with Triton."""
    first, skipped = divmod(offset, PER_COUNTER)
    blocks = triton.cdiv(skipped + src.numel(), BLOCK)
    with torch.cuda.device_of(src):
        round_kernel[(blocks,)](dst, src, seed, first, skipped, src.numel(), BLOCK)


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_round(dst: Tensor, src: Tensor, seed: int, offset: int) -> None:
    """Round contiguous `src` into contiguous `dst` with native/weights.cpp."""
    _native.call("leap_stochastic_round", src, dst, seed, offset, src.numel())


# ---- dispatch ----------------------------------------------------------------------------------------------

_OP = register("stochastic_round_", unsupported)
_ROUND = {"triton": triton_round, "native": native_round, "reference": reference}


def _run(dst: Tensor, src: Tensor, seed: int, offset: int) -> None:
    if src.numel() == 0:
        return
    whole = dst if dst.is_contiguous() else torch.empty_like(dst, memory_format=torch.contiguous_format)
    # The schema's integers are signed: the upper half of the seeds came as negative numbers.
    _ROUND[choose(_OP, dst, src)](whole, src.contiguous(), seed % (1 << 64), offset)
    if whole is not dst:
        dst.copy_(whole)


_round = define_in_place("stochastic_round_(Tensor(a!) dst, Tensor src, SymInt seed, SymInt offset) -> ()", _run)


def stochastic_round_(dst: Tensor, src: Tensor, seed: int, offset: int) -> Tensor:
    """Write `src`, rounded stochastically to bfloat16, into `dst`, and return `dst`.

    The expectation of the result is `src`. A value that bfloat16 holds exactly is never changed; inf and nan
    stay (a nan may lose its payload), and a finite value never becomes infinite. The bits drawn for element i
    (in row-major order) depend on `seed` and `offset + i` alone: the same two give the same result on every
    backend, and offsets that differ by at least the number of elements give independent draws. A tensor may be
    rounded in pieces, each with its first element's offset; offsets that are multiples of 8 are fastest.

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
    _round(dst, src, seed if seed < 1 << 63 else seed - (1 << 64), offset)
    return dst


def _check(dst: Tensor, src: Tensor, seed: int, offset: int) -> None:
    if dst.dtype != torch.bfloat16 or src.dtype != torch.float32:
        raise ValueError(f"stochastic_round_ rounds float32 to bfloat16, not {src.dtype} to {dst.dtype}.")
    check_writable("stochastic_round_", "dst", dst, "src", src)
    check_draws("stochastic_round_", seed, offset, src.numel())
