"""Identity whose gradient is scaled: the discount, for trainers that keep the whole graph.

    value    = x                        (B, ...)
    gradient = factor * gradient        factor: a number, or one per sample

For a bridge of discount alpha between two leaps: `velocity(scale_gradient(latents, alpha))`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._arguments import PerSample, check_latents, compute_dtype, expand, per_sample
from ._dispatch import choose, only_reference, register

_OP = register("scale_gradient", only_reference)


def reference_backward(grad: Tensor, factor: Tensor) -> Tensor:
    """Return `factor * grad` in the dtype of `grad`; `factor` (B,) sets the dtype of the arithmetic."""
    return (expand(factor, grad) * grad.to(factor.dtype)).to(grad.dtype)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        # A view, not a copy: the value is x itself.
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reference_backward(grad, *ctx.saved_tensors), None


def scale_gradient(x: Tensor, factor: PerSample) -> Tensor:
    """Return `x` unchanged, and multiply the gradient that comes back through it by `factor`.

    `scale_gradient(x, alpha)` has the value and gradient of `alpha * x + (1 - alpha) * stop_gradient(x)`,
    without its arithmetic. Once differentiable; `factor` is a constant; the product is taken in float32
    (float64 for float64 `x`). Any strides are taken.

    Args:
        x: (B, ...), float32, bfloat16, float16 or float64.
        factor: a number, or a tensor () or (B,).

    Returns:
        A view of `x`.

    Raises:
        ValueError: on a wrong shape or dtype, or an empty batch.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    check_latents("scale_gradient", x=x)
    choose(_OP, x)
    factors = per_sample("scale_gradient", "factor", factor, x, compute_dtype(x))
    result: Tensor = _ScaleGradient.apply(x, factors)
    return result
