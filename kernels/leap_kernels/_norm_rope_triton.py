"""The arithmetic of `qk_norm_rope` on one tensor of queries or keys, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ._norm_rope import Rotation, as_float, neighbours
from ._triton import jit, tl, triton

TILE = 1024
"""Elements of a program's tile: a few heads of a token."""
TOKENS = 16
"""Tokens of a program that adds up the gradient at a weight."""


@jit
def _load_pairs(row, offsets, inside, HALF: tl.constexpr, LANES: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load heads at `row` (N, 1): the first numbers of their pairs, and the second ones."""
    if HALVES:
        first = tl.load(row + offsets, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(row + HALF + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        both = tl.load(row + offsets, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [both.shape[0], LANES, 2]))
    return first, second


@jit
def _store_pairs(row, offsets, inside, first, second, HALF: tl.constexpr, LANES: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    if HALVES:
        tl.store(row + offsets, first.to(row.dtype.element_ty), mask=inside)
        tl.store(row + HALF + offsets, second.to(row.dtype.element_ty), mask=inside)
    else:
        both = tl.reshape(tl.join(first, second), [first.shape[0], 2 * LANES])
        tl.store(row + offsets, both.to(row.dtype.element_ty), mask=inside)


@jit
def _weight_pairs(weight_ptr, pair, WIDTH: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where in a head the pairs (LANES,) have their numbers, and the weights there as (1, LANES)."""
    at_first = pair if HALVES else 2 * pair
    at_second = pair + HALF if HALVES else 2 * pair + 1
    inside = pair < HALF
    first = tl.load(weight_ptr + at_first, mask=inside, other=0.0)[None, :]
    second = tl.load(weight_ptr + at_second, mask=inside & (at_second < WIDTH), other=0.0)[None, :]
    return first, second


@jit
def norm_rope_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_batch,
    x_token,
    x_head,
    out_batch,
    out_token,
    table_batch,
    tokens,
    heads,
    eps,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    HEADS: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROPE: tl.constexpr,
    HALVES: tl.constexpr,
):
    HALF: tl.constexpr = (WIDTH + 1) // 2
    tiles = tl.cdiv(heads, HEADS)
    program = tl.program_id(0)
    token = (program // tiles % tokens).to(tl.int64)
    sample = (program // tiles // tokens).to(tl.int64)
    # 64 bits: a tensor may exceed 2^31 elements.
    head = (program % tiles).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    offsets = tl.arange(0, LANES if HALVES else 2 * LANES)[None, :]
    inside = (head < heads) & (offsets < (HALF if HALVES else WIDTH))
    x_row = x_ptr + sample * x_batch + token * x_token + head * x_head
    first, second = _load_pairs(x_row, offsets, inside, HALF, LANES, HALVES)
    squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
    rstd = 1.0 / tl.sqrt(squares / WIDTH + eps)
    first, second = first * rstd, second * rstd
    pair = tl.arange(0, LANES)
    if WEIGHT:
        first_weight, second_weight = _weight_pairs(weight_ptr, pair, WIDTH, HALF, HALVES)
        first, second = first * first_weight, second * second_weight
    if ROPE:
        at = sample * table_batch + token * HALF + pair
        cos = tl.load(cos_ptr + at, mask=pair < HALF, other=0.0)[None, :]
        sin = tl.load(sin_ptr + at, mask=pair < HALF, other=0.0)[None, :]
        first, second = first * cos - second * sin, second * cos + first * sin
    out_row = out_ptr + sample * out_batch + token * out_token + head * WIDTH
    _store_pairs(out_row, offsets, inside, first, second, HALF, LANES, HALVES)


@jit
def norm_rope_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    partial_ptr,
    grad_batch,
    grad_token,
    grad_head,
    x_batch,
    x_token,
    x_head,
    table_batch,
    samples,
    tokens,
    heads,
    eps,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_WANTED: tl.constexpr,
    ROPE: tl.constexpr,
    HALVES: tl.constexpr,
):
    HALF: tl.constexpr = (WIDTH + 1) // 2
    tiles = tl.cdiv(heads, HEADS)
    program = tl.program_id(0)
    head = (program % tiles).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    offsets = tl.arange(0, LANES if HALVES else 2 * LANES)[None, :]
    pair = tl.arange(0, LANES)
    if WEIGHT:
        first_weight, second_weight = _weight_pairs(weight_ptr, pair, WIDTH, HALF, HALVES)
    if WEIGHT_WANTED:
        first_sum = tl.zeros([HEADS, LANES], dtype=tl.float32)
        second_sum = tl.zeros([HEADS, LANES], dtype=tl.float32)
    for step in range(TOKENS):
        number = (program // tiles).to(tl.int64) * TOKENS + step
        sample, token = number // tokens, number % tokens
        inside = (sample < samples) & (head < heads) & (offsets < (HALF if HALVES else WIDTH))
        x_row = x_ptr + sample * x_batch + token * x_token + head * x_head
        first, second = _load_pairs(x_row, offsets, inside, HALF, LANES, HALVES)
        grad_row = grad_ptr + sample * grad_batch + token * grad_token + head * grad_head
        first_grad, second_grad = _load_pairs(grad_row, offsets, inside, HALF, LANES, HALVES)
        if ROPE:
            at = sample * table_batch + token * HALF + pair
            known = (pair < HALF) & (sample < samples)
            cos = tl.load(cos_ptr + at, mask=known, other=0.0)[None, :]
            sin = tl.load(sin_ptr + at, mask=known, other=0.0)[None, :]
            first_grad, second_grad = first_grad * cos + second_grad * sin, second_grad * cos - first_grad * sin
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        rstd = 1.0 / tl.sqrt(squares / WIDTH + eps)
        if WEIGHT_WANTED:
            # Masked lanes hold zeros and add nothing. Each program owns its sums: no atomics, one order.
            first_sum += first_grad * first * rstd
            second_sum += second_grad * second * rstd
        if WEIGHT:
            first_grad, second_grad = first_grad * first_weight, second_grad * second_weight
        mean = tl.sum(first_grad * first + second_grad * second, axis=1, keep_dims=True) / WIDTH
        share = rstd * rstd * mean
        first, second = rstd * (first_grad - first * share), rstd * (second_grad - second * share)
        out_row = out_ptr + (number * heads + head) * WIDTH
        _store_pairs(out_row, offsets, inside, first, second, HALF, LANES, HALVES)
    if WEIGHT_WANTED:
        at_first = pair if HALVES else 2 * pair
        at_second = pair + HALF if HALVES else 2 * pair + 1
        partial = partial_ptr + program.to(tl.int64) * WIDTH
        tl.store(partial + at_first, tl.sum(first_sum, axis=0), mask=pair < HALF)
        tl.store(partial + at_second, tl.sum(second_sum, axis=0), mask=(pair < HALF) & (at_second < WIDTH))


def _tile(x: Tensor) -> tuple[int, int]:
    """Return the pairs of a head, and the heads of a tile, as powers of two."""
    lanes = triton.next_power_of_2((x.shape[-1] + 1) // 2)
    return lanes, min(triton.next_power_of_2(x.shape[2]), max(1, TILE // (2 * lanes)))


def _warps(rotation: Rotation) -> int:
    """Return as many warps as load 128 bits of bfloat16 a thread: halves of heads are loaded one after the other."""
    return 2 if rotation.cos is not None and rotation.halves else 4


def triton_forward(x: Tensor, weight: Tensor | None, rotation: Rotation, out: Tensor) -> None:
    """Compute queries or keys with Triton; arguments as for `reference_forward`, the heads of `out` side by side."""
    x, weight = neighbours(x), as_float(weight)
    batch, tokens, heads, width = x.shape
    cos, sin, table_batch = rotation.tables(torch.float32)
    lanes, tile_heads = _tile(x)
    with torch.cuda.device_of(x):
        # Without weight or rotation, nothing reads their pointers.
        norm_rope_kernel[(batch * tokens * triton.cdiv(heads, tile_heads),)](
            *(x, x if weight is None else weight, x if cos is None else cos, x if sin is None else sin, out),
            *(*x.stride()[:3], *out.stride()[:2], table_batch, tokens, heads, rotation.eps),
            *(width, lanes, tile_heads, weight is not None, cos is not None, cos is not None and rotation.halves),
            num_warps=_warps(rotation),
        )


def triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rotation: Rotation, weight_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients with Triton; arguments as for `reference_backward`."""
    grad, x, factors = neighbours(grad), neighbours(x), as_float(weight)
    batch, tokens, heads, width = x.shape
    cos, sin, table_batch = rotation.tables(torch.float32)
    lanes, tile_heads = _tile(x)
    out = x.new_empty(x.shape)
    weight_wanted = weight_wanted and weight is not None
    tokens_of_program = TOKENS if weight_wanted else 1
    programs = triton.cdiv(batch * tokens, tokens_of_program) * triton.cdiv(heads, tile_heads)
    partial = x.new_empty(programs if weight_wanted else 0, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        norm_rope_backward_kernel[(programs,)](
            *(grad, x, x if factors is None else factors, x if cos is None else cos, x if sin is None else sin),
            *(out, partial if weight_wanted else x),
            *(*grad.stride()[:3], *x.stride()[:3], table_batch, batch, tokens, heads, rotation.eps),
            *(width, lanes, tile_heads, tokens_of_program, factors is not None, weight_wanted),
            *(cos is not None, cos is not None and rotation.halves),
            num_warps=_warps(rotation),
        )
    return out, partial.sum(dim=0).to(weight.dtype) if weight is not None and weight_wanted else None
