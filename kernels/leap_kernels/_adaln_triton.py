"""The Triton kernels of `adaln_modulate`: a program takes a strip of rows of one sample, a row at a time."""

from __future__ import annotations

from ._triton import jit, tl, triton

LONGEST = 8192
"""Elements of the longest row that a program holds in registers; of longer ones see `_adaln_wide`."""


def block_and_warps(width: int, sums: bool = False) -> tuple[int, int]:
    """Return a program's block for rows of `width`, and its warps, so that no register has to be spilled.

    A thread holds eight elements of a row (sixteen of the longest), or sixteen where it also keeps sums.
    """
    block = max(256, triton.next_power_of_2(width))
    return block, max(1, min(16, block // (512 if sums else 256)))


@jit
def adaln_kernel(  # type: ignore[no-untyped-def]
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
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = 1 + tl.load(scale_ptr + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + sample * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, tl.minimum(first + STRIP, rows)):
        at = sample * rows + row
        x = tl.load(x_ptr + at * width + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x) / width
        centered = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered) / width + eps)
        y = centered * rstd * factor
        if SHIFT:
            y += shift
        tl.store(out_ptr + at * width + columns, y.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(statistics_ptr + at, mean)
        tl.store(statistics_ptr + all_rows + at, rstd)


@jit
def adaln_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    scale_ptr,
    statistics_ptr,
    grad_x_ptr,
    sums_ptr,
    rows,
    all_rows,
    strips,
    width,
    scale_stride,
    SUMS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // strips
    first = tl.program_id(0) % strips * STRIP
    columns = tl.arange(0, BLOCK)
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
        # What pads the row has a gradient of zero: it adds nothing to a sum.
        scaled = grad * factor
        projection = tl.sum(scaled * xhat) / width
        grad_x = rstd * (scaled - tl.sum(scaled) / width - xhat * projection)
        tl.store(grad_x_ptr + at * width + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            grad_shift += grad
            grad_scale += grad * xhat
    if SUMS:
        to = sums_ptr + program * width + columns
        tl.store(to, grad_shift, mask=inside)
        tl.store(to + tl.num_programs(0).to(tl.int64) * width, grad_scale, mask=inside)
