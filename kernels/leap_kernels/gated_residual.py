"""The residual of a transformer block, gated by a vector of its sample.

    out = x + gate * y         x, y (B, ..., C); gate (B, C)

Backward, with g the gradient at out: x gets g itself, y gate * g, and gate the sum of g * y over the rows of a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
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
from ._triton import jit, tl, triton

# ---- reference ---------------------------------------------------------------------------------------------


def reference_forward(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Compute the sum in plain PyTorch."""
    dtype = compute_dtype(x, gate, y)
    out = in_rows(x).to(dtype) + in_rows(gate).to(dtype) * in_rows(y).to(dtype)
    return out.to(x.dtype).reshape(x.shape).contiguous()


def reference_backward(grad: Tensor, gate: Tensor, y: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Return the gradients at gate and y, the latter in `dtype`; empty without `y`, and without `dtype`."""
    arithmetic = compute_dtype(grad, gate, *([] if y is None else [y]))
    wide = in_rows(grad).to(arithmetic)
    grad_gate, grad_y = nothing(gate), nothing(grad)
    if y is not None:
        grad_gate = (wide * in_rows(y).to(arithmetic)).sum(dim=1).to(gate.dtype).reshape(gate.shape)
    if dtype is not None:
        grad_y = (in_rows(gate).to(arithmetic) * wide).to(dtype).reshape(grad.shape).contiguous()
    return grad_gate, grad_y


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def strip_of_columns(rows, strips, width, STRIP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's sample, strip of all, first and last row of its sample, columns, and their mask."""
    blocks = tl.cdiv(width, BLOCK)
    # 64 bits: a batch may exceed 2^31 elements.
    strip = (tl.program_id(0) // blocks).to(tl.int64)
    first = strip % strips * STRIP
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return strip // strips, strip, first, tl.minimum(first + STRIP, rows), columns, columns < width


@jit
def gated_kernel(  # type: ignore[no-untyped-def]
    x_ptr, gate_ptr, y_ptr, out_ptr, rows, strips, width, gate_stride, STRIP: tl.constexpr, BLOCK: tl.constexpr
):
    sample, _, first, last, columns, inside = strip_of_columns(rows, strips, width, STRIP, BLOCK)
    gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, last):
        at = (sample * rows + row) * width + columns
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        out = x + gate * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def gated_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    gate_ptr,
    y_ptr,
    sums_ptr,
    grad_y_ptr,
    rows,
    strips,
    width,
    gate_stride,
    GATE: tl.constexpr,
    Y: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, strip, first, last, columns, inside = strip_of_columns(rows, strips, width, STRIP, BLOCK)
    if Y:
        gate = tl.load(gate_ptr + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        grad_gate = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(first, last):
        at = (sample * rows + row) * width + columns
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if Y:
            tl.store(grad_y_ptr + at, (gate * grad).to(grad_y_ptr.dtype.element_ty), mask=inside)
        if GATE:
            grad_gate += grad * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        tl.store(sums_ptr + strip * width + columns, grad_gate, mask=inside)


def triton_forward(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Compute the sum with Triton."""
    x, y = x.contiguous(), y.contiguous()
    batch, rows, width = sizes(x)
    out = torch.empty_like(x)
    gate, gate_stride = strided(gate)
    strips = triton.cdiv(rows, STRIP)
    with torch.cuda.device_of(x):
        gated_kernel[(batch * strips * triton.cdiv(width, BLOCK),)](
            x, gate, y, out, rows, strips, width, gate_stride, STRIP, BLOCK
        )
    return out


def triton_backward(grad: Tensor, gate: Tensor, y: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Compute with Triton; arguments and results as for `reference_backward`."""
    grad = grad.contiguous()
    batch, rows, width = sizes(grad)
    grad_y = nothing(grad) if dtype is None else torch.empty_like(grad, dtype=dtype)
    vectors, gate_stride = strided(gate)
    blocks = triton.cdiv(width, BLOCK)
    strip = STRIP if y is None else summed_strip(batch, rows, blocks)
    strips = triton.cdiv(rows, strip)
    partial = grad.new_empty((batch, strips, width) if y is not None else 0, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        # Where a gradient is not wanted, nothing reads or writes its stand-ins.
        gated_backward_kernel[(batch * strips * blocks,)](
            *(grad, vectors, grad if y is None else y.contiguous(), partial, grad_y),
            *(rows, strips, width, gate_stride, y is not None, dtype is not None, strip, BLOCK),
        )
    grad_gate = nothing(gate) if y is None else partial.sum(dim=1).to(gate.dtype).view(gate.shape)
    return grad_gate, grad_y


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Compute the sum with native/modulation.cpp."""
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    _native.call("leap_gated_residual", x, *strided(gate), y, out, *sizes(x), x.dtype, gate.dtype, y.dtype)
    return out


def native_backward(grad: Tensor, gate: Tensor, y: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Compute with native/modulation.cpp; arguments and results as for `reference_backward`."""
    grad = grad.contiguous()
    y = None if y is None else y.contiguous()
    grad_gate = None if y is None else like_vector(gate)
    grad_y = None if dtype is None else torch.empty_like(grad, dtype=dtype)
    of_y = y.dtype if y is not None else dtype
    assert of_y is not None
    dtypes = grad.dtype, gate.dtype, of_y
    _native.call("leap_gated_residual_backward", grad, *strided(gate), y, grad_gate, grad_y, *sizes(grad), *dtypes)
    return nothing(gate) if grad_gate is None else grad_gate, nothing(grad) if grad_y is None else grad_y


# ---- dispatch and autograd ---------------------------------------------------------------------------------

_OP = register("gated_residual", unsupported)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}
_BACKWARD = {"triton": triton_backward, "native": native_backward, "reference": reference_backward}


def _run(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return _FORWARD[choose(_OP, x, gate, y)](x, gate, y)


def _fake(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run_backward(grad: Tensor, gate: Tensor, y: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    tensors = (grad, gate) if y is None else (grad, gate, y)
    return _BACKWARD[choose(_OP, *tensors)](grad, gate, y, dtype)


def _fake_backward(grad: Tensor, gate: Tensor, y: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    grad_gate = nothing(gate) if y is None else like_vector(gate)
    if dtype is None:
        return grad_gate, nothing(grad)
    return grad_gate, torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)


_gradients = define_gradient(
    "gated_residual_backward(Tensor grad, Tensor gate, Tensor? y, ScalarType? dtype) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, gate, y = inputs
    # Large, and of use to the gradient of the gate only.
    ctx.save_for_backward(gate, y if ctx.needs_input_grad[1] else None)
    ctx.dtype, ctx.setting = y.dtype, current()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, needs_gate, needs_y, *_ = ctx.needs_input_grad
    if not (needs_gate or needs_y):
        return grad, None, None
    gate, y = ctx.saved_tensors
    grad_gate, grad_y = resumed(ctx.setting, _gradients, grad, gate, y, ctx.dtype if needs_y else None)
    return grad, grad_gate if needs_gate else None, grad_y if needs_y else None


_gated = define(
    "gated_residual(Tensor x, Tensor gate, Tensor y) -> Tensor",
    _run,
    _fake,
    _setup_context,
    _backward,
    native=native_forward,
)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Compute `x + gate * y`, with one rounding at the end.

    Gradients reach all three, once: not their own gradients. Saved for them are `gate`, and `y` where `gate` needs a
    gradient; the gradient at `x` is not copied. Arithmetic is float32 (float64 if a tensor is float64). Any strides are
    taken; a `gate` that is a chunk of a wider tensor is not copied.

    Args:
        x: (B, ..., C), float32, bfloat16, float16 or float64.
        gate: (B, C), or with ones in between as (B, 1, C), any of these dtypes.
        y: shape of `x`, any of these dtypes.

    Returns:
        The sum (B, ..., C), contiguous and of the dtype of `x`.

    Raises:
        ValueError: on a wrong shape, dtype or device, or no element.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    check_rows("gated_residual", x, "y", y)
    check_vector("gated_residual", "gate", gate, x)
    result: Tensor = _gated(x, gate, y)
    return result
