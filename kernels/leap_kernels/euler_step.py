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

from . import _native
from ._arguments import PerSample, check_latents, compute_dtype, expand, per_sample, sigma_difference, size
from ._dispatch import choose, current, register, resumed, unsupported
from ._library import define
from ._triton import block_of_sample, jit, tl, triton
from .scale_gradient import scaled, scaled_twice

# ---- reference ---------------------------------------------------------------------------------------------


def reference_forward(
    x: Tensor, velocity: Tensor, delta: Tensor, uncond: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Take the step in plain PyTorch; `delta = sigma_next - sigma` (B,) sets the dtype of the arithmetic."""
    guided = velocity.to(delta.dtype)
    if uncond is not None and scale is not None:
        wide_uncond = uncond.to(delta.dtype)
        guided = wide_uncond + expand(scale, x) * (guided - wide_uncond)
    return (x.to(delta.dtype) + expand(delta, x) * guided).to(x.dtype).contiguous()


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def euler_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    velocity_ptr,
    uncond_ptr,
    delta_ptr,
    scale_ptr,
    out_ptr,
    per_sample,
    blocks,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, at, inside = block_of_sample(per_sample, blocks, BLOCK)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    velocity = tl.load(velocity_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        uncond = tl.load(uncond_ptr + at, mask=inside, other=0.0).to(tl.float32)
        velocity = uncond + tl.load(scale_ptr + sample) * (velocity - uncond)
    stepped = x + tl.load(delta_ptr + sample) * velocity
    tl.store(out_ptr + at, stepped.to(out_ptr.dtype.element_ty), mask=inside)


def triton_forward(x: Tensor, velocity: Tensor, delta: Tensor, uncond: Tensor | None, scale: Tensor | None) -> Tensor:
    """Take the step with Triton; arguments as for `reference_forward`."""
    x, velocity = x.contiguous(), velocity.contiguous()
    batch, per_sample = size(x)
    blocks = triton.cdiv(per_sample, BLOCK)
    out = torch.empty_like(x)
    # Without guidance nothing reads the stand-ins.
    read = velocity if uncond is None else uncond.contiguous()
    guidance = delta if scale is None else scale
    with torch.cuda.device_of(x):
        euler_kernel[(batch * blocks,)](
            x, velocity, read, delta, guidance, out, per_sample, blocks, uncond is not None, BLOCK
        )
    return out


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(x: Tensor, velocity: Tensor, delta: Tensor, uncond: Tensor | None, scale: Tensor | None) -> Tensor:
    """Take the step with native/euler_step.cpp; arguments as for `reference_forward`."""
    x, velocity = x.contiguous(), velocity.contiguous()
    uncond = None if uncond is None else uncond.contiguous()
    out = torch.empty_like(x)
    _native.call("leap_euler_step", x, velocity, uncond, delta, scale, out, *size(x), x.dtype, velocity.dtype)
    return out


# ---- dispatch and autograd ---------------------------------------------------------------------------------


def eligible(backend: str, x: Tensor, *velocities: Tensor) -> str | None:
    """Say why `backend` cannot take x, velocity and perhaps uncond_velocity, or return None if it can."""
    if backend == "native" and len({velocity.dtype for velocity in velocities}) > 1:
        return "native code needs velocity and uncond_velocity of one dtype"
    return unsupported(backend, x, *velocities)


_OP = register("euler_step", eligible)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}


def _run(x: Tensor, velocity: Tensor, delta: Tensor, uncond: Tensor | None, scale: Tensor | None) -> Tensor:
    tensors = [x, velocity] if uncond is None else [x, velocity, uncond]
    return _FORWARD[choose(_OP, *tensors)](x, velocity, delta, uncond, scale)


def _fake(x: Tensor, velocity: Tensor, delta: Tensor, uncond: Tensor | None, scale: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, velocity, delta, uncond, scale = inputs
    ctx.save_for_backward(delta, scale)
    ctx.save_for_forward(delta, scale)
    ctx.dtypes = velocity.dtype, None if uncond is None else uncond.dtype
    ctx.setting = current()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    delta, scale = ctx.saved_tensors
    _, needs_velocity, _, needs_uncond, _ = ctx.needs_input_grad
    velocity_dtype, uncond_dtype = ctx.dtypes
    grad_velocity = grad_uncond = None
    if scale is None:
        factor = delta
    else:
        factor, factor_uncond = delta * scale, delta * (1 - scale)
        if needs_velocity and needs_uncond and velocity_dtype == uncond_dtype:
            both = resumed(ctx.setting, scaled_twice, grad, factor, factor_uncond, velocity_dtype)
            grad_velocity, grad_uncond = both
            return grad, grad_velocity, None, grad_uncond, None
    if needs_velocity:
        grad_velocity = resumed(ctx.setting, scaled, grad, factor, velocity_dtype)
    if needs_uncond:
        grad_uncond = resumed(ctx.setting, scaled, grad, factor_uncond, uncond_dtype)
    return grad, grad_velocity, None, grad_uncond, None


def _jvp(ctx: Any, x: Tensor, velocity: Tensor, delta: None, uncond: Tensor | None, scale: None) -> Tensor:
    delta, scale = ctx.saved_tensors
    tangent: Tensor = step(x, velocity, delta, uncond, scale)
    return tangent


step = define(
    "euler_step(Tensor x, Tensor velocity, Tensor delta, Tensor? uncond, Tensor? scale) -> Tensor",
    _run,
    _fake,
    _setup_context,
    _backward,
    _jvp,
    "element",
)
"""`step(x, velocity, delta, uncond, scale)`, with the arguments of `reference_forward`."""


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
    `v = velocity`. Gradients reach `x` and both velocities; sigmas and the scale are constants. Arithmetic is
    float32 (float64 if a tensor is float64). Any strides are taken.

    Args:
        x: latents (B, ...), float32, bfloat16, float16 or float64.
        velocity: shape of `x`, any of these dtypes.
        sigma: noise level of `x`; a number, or a tensor () or (B,).
        sigma_next: noise level after the step; likewise.
        uncond_velocity: shape of `x`; given together with `guidance_scale`, or not at all.
        guidance_scale: a number, or a tensor () or (B,).

    Returns:
        The latents (B, ...) after the step, contiguous and of the dtype of `x`.

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
    result: Tensor = step(x, velocity, delta, uncond_velocity, scale)
    return result
