"""Identity whose gradient is scaled: the discount, for trainers that keep the whole graph.

    value    = x                        (B, ...)
    gradient = factor * gradient        factor: a number, or one per sample

For a bridge of discount alpha between two leaps: `velocity(scale_gradient(latents, alpha))`.

The product is an op of its own, `scaled`: it is the backward pass of every op that is linear in its latents, and of
itself. A kernel call makes up to two products of one gradient, and reads it once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from ._arguments import PerSample, check_latents, compute_dtype, expand, per_sample, size
from ._dispatch import choose, current, register, resumed, unsupported
from ._library import define
from ._triton import block_of_sample, jit, tl, triton

# ---- reference ---------------------------------------------------------------------------------------------


def reference(grad: Tensor, factors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return `factor * grad` in `dtype` for each of the factors (B,), which set the dtype of the arithmetic."""
    return [(expand(factor, grad) * grad.to(factor.dtype)).to(dtype).contiguous() for factor in factors]


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def scale_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    factor_ptr,
    out_ptr,
    second_factor_ptr,
    second_out_ptr,
    per_sample,
    blocks,
    TWICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, at, inside = block_of_sample(per_sample, blocks, BLOCK)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    product = tl.load(factor_ptr + sample) * grad
    tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=inside)
    if TWICE:
        second = tl.load(second_factor_ptr + sample) * grad
        tl.store(second_out_ptr + at, second.to(second_out_ptr.dtype.element_ty), mask=inside)


def triton_scaled(grad: Tensor, factors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Compute the products with Triton; arguments as for `reference`, at most two factors."""
    grad = grad.contiguous()
    batch, per_sample = size(grad)
    blocks = triton.cdiv(per_sample, BLOCK)
    outs = [torch.empty_like(grad, dtype=dtype) for _ in factors]
    with torch.cuda.device_of(grad):
        # With one factor, nothing reads or writes the last two pointers.
        scale_kernel[(batch * blocks,)](
            grad, factors[0], outs[0], factors[-1], outs[-1], per_sample, blocks, len(factors) == 2, BLOCK
        )
    return outs


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_scaled(grad: Tensor, factors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Compute the products with native/euler_step.cpp; arguments as for `reference`, at most two factors."""
    grad = grad.contiguous()
    outs = [torch.empty_like(grad, dtype=dtype) for _ in factors]
    second = (factors[1], outs[1]) if len(factors) == 2 else (None, None)
    _native.call("leap_scale", grad, factors[0], outs[0], *second, *size(grad), grad.dtype, dtype)
    return outs


# ---- dispatch and autograd ---------------------------------------------------------------------------------

_OP = register("scale_gradient", unsupported)
_SCALED = {"triton": triton_scaled, "native": native_scaled, "reference": reference}


def _run(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return _SCALED[choose(_OP, grad, factor)](grad, [factor], dtype)[0]


def _run_twice(grad: Tensor, factor: Tensor, second_factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    product, second = _SCALED[choose(_OP, grad, factor, second_factor)](grad, [factor, second_factor], dtype)
    return product, second


def _fake(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)


def _fake_twice(grad: Tensor, factor: Tensor, second_factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _fake(grad, factor, dtype), _fake(grad, second_factor, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    grad, *factors, _ = inputs
    ctx.save_for_backward(*factors)
    ctx.save_for_forward(*factors)
    ctx.dtype, ctx.result_dtype, ctx.setting = grad.dtype, inputs[-1], current()


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    products = [
        resumed(ctx.setting, scaled, grad, factor, ctx.dtype)
        for grad, factor in zip(grads, ctx.saved_tensors, strict=True)
    ]
    return sum(products[1:], products[0]), *(None for _ in products), None


def _jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    (factor,) = ctx.saved_tensors
    product: Tensor = scaled(tangent, factor, ctx.result_dtype)
    return product


def _jvp_twice(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, Tensor]:
    products: tuple[Tensor, Tensor] = scaled_twice(tangent, *ctx.saved_tensors, ctx.result_dtype)
    return products


scaled = define(
    "scaled(Tensor grad, Tensor factor, ScalarType dtype) -> Tensor",
    _run,
    _fake,
    _setup_context,
    _backward,
    _jvp,
    "element",
)
"""`scaled(grad, factor, dtype)`: `factor * grad` in `dtype`; `factor` (B,) has the dtype of the arithmetic."""

scaled_twice = define(
    "scaled_twice(Tensor grad, Tensor factor, Tensor second_factor, ScalarType dtype) -> (Tensor, Tensor)",
    _run_twice,
    _fake_twice,
    _setup_context,
    _backward,
    _jvp_twice,
    "element",
)
"""`scaled_twice(grad, factor, second_factor, dtype)`: both products from one pass over `grad`."""


def _copied(x: Tensor, factor: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _fake_copy(x: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_discount(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, factor = inputs
    ctx.save_for_backward(factor)
    ctx.save_for_forward(factor)
    ctx.result_dtype, ctx.setting = x.dtype, current()


def _backward_discount(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (factor,) = ctx.saved_tensors
    return resumed(ctx.setting, scaled, grad, factor, grad.dtype), None


_discount = define(
    "scale_gradient(Tensor x, Tensor factor) -> Tensor",
    _copied,
    _fake_copy,
    _setup_discount,
    _backward_discount,
    _jvp,
    "element",
)


def scale_gradient(x: Tensor, factor: PerSample) -> Tensor:
    """Return a copy of `x`, and multiply the gradient that comes back through it by `factor`.

    `scale_gradient(x, alpha)` has the value and gradient of `alpha * x + (1 - alpha) * stop_gradient(x)`,
    without its arithmetic; a forward-mode derivative is multiplied likewise. A copy, so that either may be changed in
    place: in a view, autograd would forbid it or lose the factor. `factor` is a constant; the product is taken in
    float32 (float64 for float64 `x`). Any strides are taken.

    Args:
        x: (B, ...), float32, bfloat16, float16 or float64.
        factor: a number, or a tensor () or (B,).

    Returns:
        The values of `x`, contiguous.

    Raises:
        ValueError: on a wrong shape or dtype, or an empty batch.
        BackendUnavailable: in the backward pass, in strict mode, if the backend asked for cannot run.
    """
    check_latents("scale_gradient", x=x)
    factors = per_sample("scale_gradient", "factor", factor, x, compute_dtype(x))
    result: Tensor = _discount(x, factors)
    return result
