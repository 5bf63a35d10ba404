"""One leap along a velocity, and its connector to a latent of the real rollout.

    xhat     = x - (sigma_from - sigma_to) * velocity          x, velocity: (B, ...); sigmas: per sample
    latents  = xhat                                            without a target
    latents  = target, with the gradient of xhat               with one: xhat + stop_gradient(target - xhat)
    distance = mean |target - xhat| over each sample           (B,), detached

Backward, with g the gradient at `latents`: the gradient at x is g, at velocity -(sigma_from - sigma_to) * g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._arguments import PerSample, check_latents, compute_dtype, expand, rows, sigma_difference
from ._dispatch import Backend, choose, register, unsupported
from ._triton import jit, tl, triton

# ---- reference ---------------------------------------------------------------------------------------------


def reference_forward(
    x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the leap in plain PyTorch, in the dtype of `delta = sigma_from - sigma_to` (B,)."""
    xhat = x.to(delta.dtype) - expand(delta, x) * velocity.to(delta.dtype)
    if target is None:
        return xhat.to(x.dtype).contiguous(), None
    distance = rows((target.to(delta.dtype) - xhat).abs()).mean(dim=1)
    return target.clone(memory_format=torch.contiguous_format), distance


def reference_backward(grad: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient at velocity, in its `dtype`; the gradient at x is `grad` itself."""
    return (-expand(delta, grad) * grad.to(delta.dtype)).to(dtype)


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    velocity_ptr,
    target_ptr,
    delta_ptr,
    out_ptr,
    partial_ptr,
    per_sample,
    blocks,
    HAS_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per block of one sample. 64-bit from the start: a batch may exceed 2^31 elements.
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    within = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = within < per_sample
    at = sample * per_sample + within
    delta = tl.load(delta_ptr + sample)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    velocity = tl.load(velocity_ptr + at, mask=inside, other=0.0).to(tl.float32)
    xhat = x - delta * velocity
    if HAS_TARGET:
        target = tl.load(target_ptr + at, mask=inside, other=0.0)
        tl.store(out_ptr + at, target, mask=inside)
        # Masked lanes hold 0 - 0 and add nothing. Each block owns its sum: no atomics, one order.
        tl.store(partial_ptr + program, tl.sum(tl.abs(target.to(tl.float32) - xhat)))
    else:
        tl.store(out_ptr + at, xhat.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, delta_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    within = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = within < per_sample
    at = sample * per_sample + within
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scaled = -tl.load(delta_ptr + sample) * grad
    tl.store(out_ptr + at, scaled.to(out_ptr.dtype.element_ty), mask=inside)


def triton_forward(x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compute the leap with Triton; arguments as for `reference_forward`."""
    x, velocity = x.contiguous(), velocity.contiguous()
    batch, per_sample = x.shape[0], x.numel() // x.shape[0]
    blocks = triton.cdiv(per_sample, BLOCK)
    out = torch.empty_like(x)
    # Without a target nothing reads or writes the last two pointers.
    read = x if target is None else target.contiguous()
    partial = delta if target is None else torch.empty(batch, blocks, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _forward_kernel[(batch * blocks,)](
            x, velocity, read, delta, out, partial, per_sample, blocks, target is not None, BLOCK
        )
    return out, None if target is None else partial.sum(dim=1) / per_sample


def triton_backward(grad: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient at velocity with Triton; arguments as for `reference_backward`."""
    grad = grad.contiguous()
    batch, per_sample = grad.shape[0], grad.numel() // grad.shape[0]
    blocks = triton.cdiv(per_sample, BLOCK)
    out = torch.empty_like(grad, dtype=dtype)
    with torch.cuda.device_of(grad):
        _backward_kernel[(batch * blocks,)](grad, delta, out, per_sample, blocks, BLOCK=BLOCK)
    return out


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compute the leap with kernels/native/leap_update.cpp; arguments as for `reference_forward`."""
    x, velocity = x.contiguous(), velocity.contiguous()
    out = torch.empty_like(x)
    batch, per_sample = x.shape[0], x.numel() // x.shape[0]
    distance = None
    if target is not None:
        target, distance = target.contiguous(), torch.empty(batch, dtype=torch.float32)
    _native.call("leap_update_forward", x, velocity, target, delta, out, distance, batch, per_sample, dtype=x.dtype)
    return out, distance


def native_backward(grad: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient at velocity with native code, which has `dtype` equal to that of `grad`."""
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    batch, per_sample = grad.shape[0], grad.numel() // grad.shape[0]
    _native.call("leap_update_backward", grad, delta, out, batch, per_sample, dtype=dtype)
    return out


# ---- dispatch and autograd ---------------------------------------------------------------------------------


def eligible(backend: Backend, x: Tensor, *others: Tensor) -> str | None:
    """Say why `backend` cannot take these tensors (x, velocity, perhaps target), or return None if it can."""
    if backend == "native" and any(other.dtype != x.dtype for other in others):
        return "native code needs x and velocity of one dtype"
    return unsupported(backend, x, *others)


_OP = register("leap_update", eligible)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}
_BACKWARD = {"triton": triton_backward, "native": native_backward, "reference": reference_backward}


class _LeapUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor | None, backend: Backend
    ) -> tuple[Tensor, Tensor | None]:
        return _FORWARD[backend](x, velocity, delta, target)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        _, velocity, delta, _, ctx.backend = inputs
        ctx.save_for_backward(delta)
        ctx.velocity_dtype = velocity.dtype
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        (delta,) = ctx.saved_tensors
        grad_velocity = None
        if ctx.needs_input_grad[1]:
            # Forward's backend again, unless a transform such as vmap wraps the gradient.
            backend = ctx.backend if eligible(ctx.backend, grad) is None else "reference"
            grad_velocity = _BACKWARD[backend](grad, delta, ctx.velocity_dtype)
        return grad, grad_velocity, None, None, None


def leap_update(
    x: Tensor,
    velocity: Tensor,
    sigma_from: PerSample,
    sigma_to: PerSample,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Leap from `sigma_from` to `sigma_to` in one step: `xhat = x - (sigma_from - sigma_to) * velocity`.

    With `target`, the latent connector `xhat + stop_gradient(target - xhat)`: the value is `target`, bit for
    bit, the gradient is that of `xhat`. Gradients reach `x` and `velocity`, once differentiable; sigmas and
    target are constants. Arithmetic is float32 (float64 if a tensor is float64). Any strides are taken.

    Args:
        x: latents (B, ...), float32, bfloat16, float16 or float64.
        velocity: shape of `x`, any of these dtypes.
        sigma_from: noise level of `x`; a number, or a tensor () or (B,).
        sigma_to: noise level after the leap; likewise.
        target: shape and dtype of `x`, or None.

    Returns:
        The latents (B, ...), contiguous and of the dtype of `x`; and with `target` the distance (B,),
        `mean |target - xhat|` per sample, float32 (float64 for float64 arithmetic), detached, else None.

    Raises:
        ValueError: on a wrong shape, dtype or device, or an empty batch.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    check_latents("leap_update", x=x, velocity=velocity, target=target)
    check_latents("leap_update", same_dtype=True, x=x, target=target)
    tensors = [x, velocity] if target is None else [x, velocity, target]
    dtype = compute_dtype(*tensors)
    delta = sigma_difference("leap_update", ("sigma_from", "sigma_to"), sigma_from, sigma_to, x, dtype)
    backend = choose(_OP, *tensors)
    latents, distance = _LeapUpdate.apply(x, velocity, delta, target, backend)
    return latents, distance
