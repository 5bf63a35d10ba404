"""GELU in its tanh form, which keeps nothing but its input.

    y = 0.5 * x * (1 + tanh(z / 2)) = x * sigmoid(z),    z = 2 * sqrt(2 / pi) * (x + 0.044715 * x^3)

Backward, with g the gradient at y and s = sigmoid(z): x gets g * (s + x * s * (1 - s) * dz/dx), recomputed. Where a
linear layer that follows wants y for the gradient of its weight, the same pass makes it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import _native
from ._arguments import FLOATS, compute_dtype
from ._dispatch import choose, current, register, resumed, unsupported
from ._first_order import define_gradient
from ._library import define
from ._modulation import nothing
from ._triton import jit, tl, triton

# ---- reference ---------------------------------------------------------------------------------------------


def reference_forward(x: Tensor) -> Tensor:
    """Compute y in plain PyTorch."""
    return functional.gelu(x.to(compute_dtype(x)), approximate="tanh").to(x.dtype).contiguous()


def reference_backward(grad: Tensor, x: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient at x, and y if it is to be made `again`, else nothing."""
    dtype = compute_dtype(x)
    grad_x: Tensor = torch.ops.aten.gelu_backward(grad.to(dtype), x.to(dtype), approximate="tanh")
    return grad_x.to(x.dtype).contiguous(), reference_forward(x) if again else nothing(x)


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def gelu_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # 64 bits: a tensor may exceed 2^31 elements.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z = x * (1.5957691216057308 + 0.07135481627159855 * x * x)
    tl.store(out_ptr + at, (x / (1 + tl.exp(-z))).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def gelu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, out_ptr, y_ptr, count, AGAIN: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    square = 0.07135481627159855 * x * x
    power = tl.exp(-x * (1.5957691216057308 + square))
    s = 1 / (1 + power)
    # power * s is 1 - s without its loss; an infinite power times zero would be no number.
    slope = s + x * s * (tl.minimum(power, 3.0e38) * s) * (1.5957691216057308 + 3 * square)
    tl.store(out_ptr + at, (grad * slope).to(out_ptr.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(y_ptr + at, (x / (1 + power)).to(y_ptr.dtype.element_ty), mask=inside)


def triton_forward(x: Tensor) -> Tensor:
    """Compute y with Triton."""
    x = x.contiguous()
    out = torch.empty_like(x)
    count = x.numel()
    with torch.cuda.device_of(x):
        gelu_kernel[(triton.cdiv(count, BLOCK),)](x, out, count, BLOCK)
    return out


def triton_backward(grad: Tensor, x: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    """Compute with Triton; arguments and results as for `reference_backward`."""
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    y = torch.empty_like(x) if again else nothing(x)
    count = x.numel()
    with torch.cuda.device_of(x):
        # Where y is not wanted, nothing writes its stand-in.
        gelu_backward_kernel[(triton.cdiv(count, BLOCK),)](grad, x, out, y if again else out, count, again, BLOCK)
    return out, y


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(x: Tensor) -> Tensor:
    """Compute y with native/activations.cpp."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _native.call("leap_gelu_tanh", None, x, out, None, x.numel(), x.dtype)
    return out


def native_backward(grad: Tensor, x: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    """Compute with native/activations.cpp; arguments and results as for `reference_backward`."""
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    y = torch.empty_like(x) if again else None
    _native.call("leap_gelu_tanh", grad, x, out, y, x.numel(), x.dtype)
    return out, nothing(x) if y is None else y


# ---- dispatch and autograd ---------------------------------------------------------------------------------

_OP = register("gelu_tanh", unsupported)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}
_BACKWARD = {"triton": triton_backward, "native": native_backward, "reference": reference_backward}


def _run(x: Tensor) -> Tensor:
    return _FORWARD[choose(_OP, x)](x)


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run_backward(grad: Tensor, x: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    return _BACKWARD[choose(_OP, grad, x)](grad, x, again)


def _fake_backward(grad: Tensor, x: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    return _fake(x), _fake(x) if again else nothing(x)


gradient = define_gradient(
    "gelu_tanh_backward(Tensor grad, Tensor x, bool again) -> (Tensor, Tensor)", _run_backward, _fake_backward
)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.setting = current()


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    grad_x: Tensor = resumed(ctx.setting, gradient, grad, x, False)[0]
    return grad_x


_gelu = define("gelu_tanh(Tensor x) -> Tensor", _run, _fake, _setup_context, _backward, native=native_forward)


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute `0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`: `gelu(x, approximate="tanh")`.

    The gradient reaches `x`, once: not its own gradient. Saved for it is `x`. Arithmetic is float32 (float64 for
    float64 `x`), rounded once. Any strides are taken.

    Args:
        x: any shape with at least one element, float32, bfloat16, float16 or float64.

    Returns:
        Shape and dtype of `x`, contiguous.

    Raises:
        ValueError: on a wrong dtype, or no element.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    if x.dtype not in FLOATS or x.numel() == 0:
        raise ValueError(
            f"gelu_tanh takes float32, bfloat16, float16 and float64 with at least one element, not {x.dtype} of "
            f"shape {tuple(x.shape)}."
        )
    result: Tensor = _gelu(x)
    return result
