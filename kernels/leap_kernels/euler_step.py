"""One Euler step of the sampler, with classifier-free guidance folded in.

    v    = uncond_velocity + guidance_scale * (velocity - uncond_velocity)     or velocity, without guidance
    next = x + (sigma_next - sigma) * v                                        all (B, ...); sigmas per sample

Backward, with g the gradient at `next` and d = sigma_next - sigma: x gets g, velocity d * guidance_scale * g
(d * g without guidance), uncond_velocity d * (1 - guidance_scale) * g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._arguments import PerSample, check_latents, compute_dtype, expand, per_sample, sigma_difference
from ._dispatch import choose, only_reference, register

_OP = register("euler_step", only_reference)


def reference_forward(
    x: Tensor, velocity: Tensor, delta: Tensor, uncond: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Take the step in plain PyTorch; `delta = sigma_next - sigma` (B,) sets the dtype of the arithmetic."""
    guided = velocity.to(delta.dtype)
    if uncond is not None and scale is not None:
        wide_uncond = uncond.to(delta.dtype)
        guided = wide_uncond + expand(scale, x) * (guided - wide_uncond)
    return (x.to(delta.dtype) + expand(delta, x) * guided).to(x.dtype)


def reference_backward(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `factor * grad` in `dtype`: the gradient at either velocity, `factor` (B,) being its weight."""
    return (expand(factor, grad) * grad.to(factor.dtype)).to(dtype)


class _EulerStep(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, velocity: Tensor, delta: Tensor, uncond: Tensor | None, scale: Tensor | None) -> Tensor:
        return reference_forward(x, velocity, delta, uncond, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, velocity, delta, uncond, scale = inputs
        ctx.save_for_backward(delta, scale)
        ctx.velocity_dtype = velocity.dtype
        ctx.uncond_dtype = None if uncond is None else uncond.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        delta, scale = ctx.saved_tensors
        grad_velocity = grad_uncond = None
        if ctx.needs_input_grad[1]:
            factor = delta if scale is None else delta * scale
            grad_velocity = reference_backward(grad, factor, ctx.velocity_dtype)
        if ctx.needs_input_grad[3]:
            grad_uncond = reference_backward(grad, delta * (1 - scale), ctx.uncond_dtype)
        return grad, grad_velocity, None, grad_uncond, None


def euler_step(
    x: Tensor,
    velocity: Tensor,
    sigma: PerSample,
    sigma_next: PerSample,
    uncond_velocity: Tensor | None = None,
    guidance_scale: PerSample | None = None,
) -> Tensor:
    """Step from `sigma` to `sigma_next`: `x + (sigma_next - sigma) * v`.

    With guidance, `v = uncond_velocity + guidance_scale * (velocity - uncond_velocity)`; without it,
    `v = velocity`. Gradients reach `x` and both velocities, once differentiable; sigmas and the scale are
    constants. Arithmetic is float32 (float64 if a tensor is float64). Any strides are taken.

    Args:
        x: latents (B, ...), float32, bfloat16, float16 or float64.
        velocity: shape of `x`, any of these dtypes.
        sigma: noise level of `x`; a number, or a tensor () or (B,).
        sigma_next: noise level after the step; likewise.
        uncond_velocity: shape of `x`; given together with `guidance_scale`, or not at all.
        guidance_scale: a number, or a tensor () or (B,).

    Returns:
        The latents (B, ...) after the step, in the dtype of `x`.

    Raises:
        ValueError: on a wrong shape, dtype or device, an empty batch, or one half of the guidance without
            the other.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    check_latents("euler_step", x=x, velocity=velocity, uncond_velocity=uncond_velocity)
    if (uncond_velocity is None) != (guidance_scale is None):
        raise ValueError("euler_step needs uncond_velocity and guidance_scale together, or neither.")
    tensors = [x, velocity] if uncond_velocity is None else [x, velocity, uncond_velocity]
    dtype = compute_dtype(*tensors)
    delta = sigma_difference("euler_step", ("sigma_next", "sigma"), sigma_next, sigma, x, dtype)
    scale = None
    if guidance_scale is not None:
        scale = per_sample("euler_step", "guidance_scale", guidance_scale, x, dtype)
    choose(_OP, *tensors)
    result: Tensor = _EulerStep.apply(x, velocity, delta, uncond_velocity, scale)
    return result
