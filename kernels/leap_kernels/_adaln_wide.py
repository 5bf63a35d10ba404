"""`adaln_modulate` of rows too wide for a program's registers, with Triton: a row is read block by block, twice.

The second reading costs 2 of 6 bytes an element in bfloat16 where no cache holds the row; backward, 4 of 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._modulation import STRIP, nothing, sizes, strided, summed_strip
from ._triton import jit, tl, triton

BLOCK = 2048
"""Elements of a row that a program has at a time."""
WARPS = 8


@jit
def wide_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    statistics_ptr,
    rows,
    all_rows,
    strips,
    width,
    shift_stride,
    scale_stride,
    eps,
    SHIFT: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: a batch may exceed 2^31 elements.
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = tl.program_id(0) % strips * STRIP
    for row in range(first, tl.minimum(first + STRIP, rows)):
        at = sample * rows + row
        mean = 0.0
        squares = 0.0
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            x = tl.load(x_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
            # Joins the moments of this block with those of the ones before it.
            count = tl.minimum(width - start, BLOCK).to(tl.float32)
            share = count / (start + count)
            ahead = tl.sum(x) / count - mean
            centered = tl.where(inside, x - (mean + ahead), 0.0)
            squares += tl.sum(centered * centered) + ahead * ahead * share * start
            mean += ahead * share
        rstd = tl.rsqrt(squares / width + eps)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            factor = 1 + tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
            y = (x - mean) * rstd * factor
            if SHIFT:
                y += tl.load(shift_ptr + sample * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at * width + columns, y.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(statistics_ptr + at, mean)
        tl.store(statistics_ptr + all_rows + at, rstd)


@jit
def wide_row_sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    scale_ptr,
    statistics_ptr,
    means_ptr,
    rows,
    all_rows,
    strips,
    width,
    scale_stride,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With h = grad * (1 + scale), writes the means of h and of h * xhat over each row."""
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = tl.program_id(0) % strips * STRIP
    for row in range(first, tl.minimum(first + STRIP, rows)):
        at = sample * rows + row
        mean = tl.load(statistics_ptr + at)
        rstd = tl.load(statistics_ptr + all_rows + at)
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        products = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            factor = 1 + tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
            # What pads the row has a gradient of zero: it adds nothing to a sum.
            grad = tl.load(grad_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
            sums += grad * factor
            products += grad * factor * ((x - mean) * rstd)
        tl.store(means_ptr + at, tl.sum(sums) / width)
        tl.store(means_ptr + all_rows + at, tl.sum(products) / width)


@jit
def wide_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    scale_ptr,
    statistics_ptr,
    means_ptr,
    grad_x_ptr,
    sums_ptr,
    rows,
    all_rows,
    strips,
    blocks,
    width,
    scale_stride,
    SUMS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes a block of columns of a strip of rows."""
    strip = (tl.program_id(0) // blocks).to(tl.int64)
    sample = strip // strips
    first = tl.program_id(0) // blocks % strips * STRIP
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    factor = 1 + tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if SUMS:
        grad_shift = tl.zeros([BLOCK], dtype=tl.float32)
        grad_scale = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(first, tl.minimum(first + STRIP, rows)):
        at = sample * rows + row
        grad = tl.load(grad_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(statistics_ptr + all_rows + at)
        xhat = (x - tl.load(statistics_ptr + at)) * rstd
        level, projection = tl.load(means_ptr + at), tl.load(means_ptr + all_rows + at)
        grad_x = rstd * (grad * factor - level - xhat * projection)
        tl.store(grad_x_ptr + at * width + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            grad_shift += grad
            grad_scale += grad * xhat
    if SUMS:
        to = sums_ptr + strip * width + columns
        tl.store(to, grad_shift, mask=inside)
        tl.store(to + (tl.num_programs(0) // blocks).to(tl.int64) * width, grad_scale, mask=inside)


def wide_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor, eps: float, out: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill and return `out` and `statistics`, those of `reference_forward`; `x` is contiguous."""
    batch, rows, width = sizes(x)
    vectors, scale_stride = strided(scale)
    # Without a shift nothing reads the stand-in.
    shifts, shift_stride = (vectors, 0) if shift is None else strided(shift)
    strips = triton.cdiv(rows, STRIP)
    with torch.cuda.device_of(x):
        wide_kernel[(batch * strips,)](
            *(x, shifts, vectors, out, statistics, rows, batch * rows, strips, width),
            *(shift_stride, scale_stride, float(eps), shift is not None, STRIP, BLOCK),
            num_warps=WARPS,
        )
    return out, statistics


def wide_backward(grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient at `x`, and with `sums` those at shift and scale by strip: (2, B, strips, C) in float32.

    `grad` and `x` are contiguous.
    """
    batch, rows, width = sizes(x)
    grad_x, means = torch.empty_like(x), torch.empty_like(statistics)
    vectors, scale_stride = strided(scale)
    blocks, strips = triton.cdiv(width, BLOCK), triton.cdiv(rows, STRIP)
    with torch.cuda.device_of(x):
        wide_row_sums_kernel[(batch * strips,)](
            *(grad, x, vectors, statistics, means, rows, batch * rows, strips, width, scale_stride, STRIP, BLOCK),
            num_warps=WARPS,
        )
        strip = summed_strip(batch, rows, blocks) if sums else STRIP
        strips = triton.cdiv(rows, strip)
        partial = statistics.new_empty(2, batch, strips, width) if sums else nothing(statistics)
        wide_backward_kernel[(batch * strips * blocks,)](
            *(grad, x, vectors, statistics, means, grad_x, partial, rows, batch * rows, strips, blocks, width),
            *(scale_stride, sums, strip, BLOCK),
            num_warps=WARPS,
        )
    return grad_x, partial
