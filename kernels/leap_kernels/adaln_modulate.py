"""Adaptive layer norm: a row is normalized, and modulated by two vectors of its sample.

    xhat = (x - mean) * rstd                   x (B, ..., C); mean and rstd = 1 / sqrt(var + eps) over C
    y    = xhat * (1 + scale) + shift          scale, shift (B, C)

Backward, with g the gradient at y and h = g * (1 + scale): x gets rstd * (h - mean(h) - xhat * mean(h * xhat)), scale
the sum of g * xhat over the rows of a sample, and shift that of g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from ._adaln_triton import LONGEST, adaln_backward_kernel, adaln_kernel, block_and_warps
from ._adaln_wide import wide_backward, wide_forward
from ._arguments import compute_dtype
from ._dispatch import choose, current, register, resumed, unsupported
from ._first_order import define_gradient
from ._library import define
from ._modulation import (
    STRIP,
    check_rows,
    check_vector,
    in_rows,
    like_vector,
    nothing,
    sizes,
    strided,
    summed_strip,
)
from ._triton import triton

# ---- reference ---------------------------------------------------------------------------------------------


def reference_forward(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y, and mean and rstd as one tensor (2, B, ...), in plain PyTorch."""
    dtype = _arithmetic(x, shift, scale)
    rows = in_rows(x).to(dtype)
    mean = rows.mean(dim=-1, keepdim=True)
    rstd = ((rows - mean).square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = (rows - mean) * rstd * (1 + in_rows(scale).to(dtype))
    if shift is not None:
        y = y + in_rows(shift).to(dtype)
    return y.to(x.dtype).reshape(x.shape).contiguous(), torch.stack([mean, rstd]).reshape(2, *x.shape[:-1])


def reference_backward(
    grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, shift_dtype: torch.dtype, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients at x, shift and scale; without `sums`, the last two are empty."""
    dtype = statistics.dtype
    mean, rstd = statistics.reshape(2, *sizes(x)[:2], 1)
    wide = in_rows(grad).to(dtype)
    xhat = (in_rows(x).to(dtype) - mean) * rstd
    scaled = wide * (1 + in_rows(scale).to(dtype))
    grad_x = rstd * (scaled - scaled.mean(-1, keepdim=True) - xhat * (scaled * xhat).mean(-1, keepdim=True))
    grad_x = grad_x.to(x.dtype).reshape(x.shape).contiguous()
    if not sums:
        return grad_x, nothing(x), nothing(x)
    grad_shift = wide.sum(dim=1).to(shift_dtype).reshape(scale.shape)
    return grad_x, grad_shift, (wide * xhat).sum(dim=1).to(scale.dtype).reshape(scale.shape)


# ---- Triton ------------------------------------------------------------------------------------------------


def triton_forward(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute with Triton; arguments and results as for `reference_forward`."""
    x = x.contiguous()
    batch, rows, width = sizes(x)
    out, statistics = _results(x, torch.float32)
    if width > LONGEST:
        return wide_forward(x, shift, scale, eps, out, statistics)
    vectors, scale_stride = strided(scale)
    # Without a shift nothing reads the stand-in.
    shifts, shift_stride = (vectors, 0) if shift is None else strided(shift)
    strips = triton.cdiv(rows, STRIP)
    block, warps = block_and_warps(width)
    with torch.cuda.device_of(x):
        adaln_kernel[(batch * strips,)](
            *(x, shifts, vectors, out, statistics, rows, batch * rows, strips, width),
            *(shift_stride, scale_stride, float(eps), shift is not None, STRIP, block),
            num_warps=warps,
        )
    return out, statistics


def triton_backward(
    grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, shift_dtype: torch.dtype, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute with Triton; arguments and results as for `reference_backward`."""
    grad, x = grad.contiguous(), x.contiguous()
    batch, rows, width = sizes(x)
    if width > LONGEST:
        grad_x, partial = wide_backward(grad, x, scale, statistics, sums)
        return grad_x, *_summed(partial, x, scale, shift_dtype, sums)
    grad_x = torch.empty_like(x)
    vectors, scale_stride = strided(scale)
    strip = summed_strip(batch, rows) if sums else STRIP
    strips = triton.cdiv(rows, strip)
    partial = statistics.new_empty(2, batch, strips, width) if sums else statistics
    block, warps = block_and_warps(width, sums)
    with torch.cuda.device_of(x):
        adaln_backward_kernel[(batch * strips,)](
            *(grad, x, vectors, statistics, grad_x, partial, rows, batch * rows, strips, width),
            *(scale_stride, sums, strip, block),
            num_warps=warps,
        )
    return grad_x, *_summed(partial, x, scale, shift_dtype, sums)


def _summed(partial: Tensor, x: Tensor, scale: Tensor, shift_dtype: torch.dtype, sums: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients at shift and scale, from those of each strip (2, B, strips, C)."""
    if not sums:
        return nothing(x), nothing(x)
    grad_shift, grad_scale = (
        part.sum(dim=1).to(dtype).view(scale.shape)
        for part, dtype in zip(partial, (shift_dtype, scale.dtype), strict=True)
    )
    return grad_shift, grad_scale


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute with native/modulation.cpp; arguments and results as for `reference_forward`."""
    x = x.contiguous()
    out, statistics = _results(x, torch.float32)
    dtypes = x.dtype, scale.dtype if shift is None else shift.dtype, scale.dtype
    vectors = *((None, 0) if shift is None else strided(shift)), *strided(scale)
    _native.call("leap_adaln", x, *vectors, eps, out, statistics, *sizes(x), *dtypes)
    return out, statistics


def native_backward(
    grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, shift_dtype: torch.dtype, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute with native/modulation.cpp; arguments and results as for `reference_backward`."""
    grad, x = grad.contiguous(), x.contiguous()
    grads = _gradients_like(x, scale, shift_dtype, sums)
    wanted = grads if sums else (grads[0], None, None)
    dtypes = x.dtype, shift_dtype, scale.dtype
    _native.call("leap_adaln_backward", grad, x, *strided(scale), statistics, *wanted, *sizes(x), *dtypes)
    return grads


# ---- dispatch and autograd ---------------------------------------------------------------------------------


def eligible(backend: str, x: Tensor, *others: Tensor) -> str | None:
    """Say why `backend` cannot take the tensors, `x` first, or return None if it can."""
    return unsupported(backend, x, *others)


_OP = register("adaln_modulate", eligible)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}
_BACKWARD = {"triton": triton_backward, "native": native_backward, "reference": reference_backward}


def _arithmetic(x: Tensor, shift: Tensor | None, scale: Tensor) -> torch.dtype:
    return compute_dtype(x, scale) if shift is None else compute_dtype(x, scale, shift)


def _results(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty((2, *x.shape[:-1]), dtype=dtype)


def _gradients_like(x: Tensor, scale: Tensor, shift_dtype: torch.dtype, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not sums:
        return grad_x, nothing(x), nothing(x)
    return grad_x, like_vector(scale, shift_dtype), like_vector(scale)


def _run(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    tensors = (x, scale) if shift is None else (x, scale, shift)
    return _FORWARD[choose(_OP, *tensors)](x, shift, scale, eps)


def _fake(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _results(x, _arithmetic(x, shift, scale))


def _run_backward(
    grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, shift_dtype: torch.dtype, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _BACKWARD[choose(_OP, x, grad, scale, statistics)](grad, x, scale, statistics, shift_dtype, sums)


def _fake_backward(
    grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, shift_dtype: torch.dtype, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(x, scale, shift_dtype, sums)


gradients = define_gradient(
    "adaln_modulate_backward(Tensor grad, Tensor x, Tensor scale, Tensor statistics, ScalarType shift_dtype, bool sums)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, _ = inputs
    ctx.save_for_backward(x, scale, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.shift_dtype, ctx.setting = scale.dtype if shift is None else shift.dtype, current()


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    _, needs_shift, needs_scale, *_others = ctx.needs_input_grad
    sums = needs_shift or needs_scale
    grads = resumed(ctx.setting, gradients, grad, *ctx.saved_tensors, ctx.shift_dtype, sums)
    grad_x, grad_shift, grad_scale = grads
    return grad_x, grad_shift if needs_shift else None, grad_scale if needs_scale else None, None


modulate = define(
    "adaln_modulate(Tensor x, Tensor? shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _backward,
)


def adaln_modulate(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalize rows and modulate them: `(x - mean) * rstd * (1 + scale) + shift`, with one rounding at the end.

    `LayerNorm(elementwise_affine=False)` and what FLUX, Stable Diffusion 3, Qwen-Image and Z-Image do after it.
    Gradients reach `x`, `shift` and `scale`, once: not their own gradients. Saved for them are `x`, `scale`, and two
    numbers a row. Arithmetic is float32 (float64 if a tensor is float64). Any strides are taken; of `shift` and
    `scale`, chunks of one wider tensor are not copied.

    Args:
        x: (B, ..., C), float32, bfloat16, float16 or float64.
        shift: (B, C), or with ones in between as (B, 1, C), any of these dtypes; None adds nothing.
        scale: likewise, with the shape of `shift`.
        eps: added to the variance.

    Returns:
        The modulated rows (B, ..., C), contiguous and of the dtype of `x`.

    Raises:
        ValueError: on a wrong shape, dtype or device, or no element.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    check_rows("adaln_modulate", x)
    check_vector("adaln_modulate", "scale", scale, x)
    if shift is not None:
        check_vector("adaln_modulate", "shift", shift, x)
        if shift.shape != scale.shape:
            raise ValueError(
                f"adaln_modulate needs shift and scale of one shape, not {tuple(shift.shape)} and {tuple(scale.shape)}."
            )
    y: Tensor = modulate(x, shift, scale, eps)[0]
    return y
