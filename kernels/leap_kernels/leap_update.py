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

from . import _native
from ._arguments import PerSample, check_latents, compute_dtype, expand, rows, sigma_difference, size
from ._dispatch import choose, current, register, resumed, unsupported
from ._library import define
from ._triton import block_of_sample, jit, tl, triton
from .euler_step import step
from .scale_gradient import scaled

# Without a target a leap is a long Euler step, and runs as one; here is the connector.

# ---- reference ---------------------------------------------------------------------------------------------


def reference_forward(x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Copy and compare the target in plain PyTorch, in the dtype of `delta = sigma_to - sigma_from` (B,)."""
    xhat = x.to(delta.dtype) + expand(delta, x) * velocity.to(delta.dtype)
    distance = rows((target.to(delta.dtype) - xhat).abs()).mean(dim=1)
    return target.clone(memory_format=torch.contiguous_format), distance


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def connector_kernel(  # type: ignore[no-untyped-def]
    x_ptr, velocity_ptr, target_ptr, delta_ptr, out_ptr, partial_ptr, per_sample, blocks, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    sample, at, inside = block_of_sample(per_sample, blocks, BLOCK)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    velocity = tl.load(velocity_ptr + at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, target, mask=inside)
    xhat = x + tl.load(delta_ptr + sample) * velocity
    # Masked lanes hold 0 - 0 and add nothing. Each block owns its sum: no atomics, one order.
    tl.store(partial_ptr + program, tl.sum(tl.abs(target.to(tl.float32) - xhat)))


def triton_forward(x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Copy and compare the target with Triton; arguments as for `reference_forward`."""
    x, velocity, target = x.contiguous(), velocity.contiguous(), target.contiguous()
    batch, per_sample = size(x)
    blocks = triton.cdiv(per_sample, BLOCK)
    out = torch.empty_like(x)
    partial = torch.empty(batch, blocks, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        connector_kernel[(batch * blocks,)](x, velocity, target, delta, out, partial, per_sample, blocks, BLOCK)
    return out, partial.sum(dim=1) / per_sample


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Copy and compare the target with native/leap_update.cpp; arguments as for `reference_forward`."""
    x, velocity, target = x.contiguous(), velocity.contiguous(), target.contiguous()
    out, distance = torch.empty_like(x), torch.empty_like(delta)
    _native.call("leap_connector", x, velocity, target, delta, out, distance, *size(x), x.dtype, velocity.dtype)
    return out, distance


# ---- dispatch and autograd ---------------------------------------------------------------------------------

_OP = register("leap_update", unsupported)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}


def _run(x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _FORWARD[choose(_OP, x, velocity, target)](x, velocity, delta, target)


def _fake(x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(delta)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _, velocity, delta, _ = inputs
    ctx.save_for_backward(delta)
    ctx.save_for_forward(delta)
    ctx.velocity_dtype, ctx.setting = velocity.dtype, current()
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (delta,) = ctx.saved_tensors
    grad_velocity = None
    if ctx.needs_input_grad[1]:
        grad_velocity = resumed(ctx.setting, scaled, grad, delta, ctx.velocity_dtype)
    return grad, grad_velocity, None, None


def _jvp(ctx: Any, x: Tensor, velocity: Tensor, *_: None) -> tuple[Tensor, None]:
    return step(x, velocity, ctx.saved_tensors[0], None, None), None


_connect = define(
    "leap_update(Tensor x, Tensor velocity, Tensor delta, Tensor target) -> (Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _backward,
    _jvp,
    "sample",
)


def leap_update(
    x: Tensor,
    velocity: Tensor,
    sigma_from: PerSample,
    sigma_to: PerSample,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Leap from `sigma_from` to `sigma_to` in one step: `xhat = x - (sigma_from - sigma_to) * velocity`.

    With `target`, the latent connector `xhat + stop_gradient(target - xhat)`: the value is `target`, bit for
    bit, the gradient is that of `xhat`. Gradients reach `x` and `velocity`; sigmas and target are constants.
    Arithmetic is float32 (float64 if a tensor is float64). Any strides are taken.

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
    if target is not None and target.dtype != x.dtype:
        raise ValueError(f"leap_update needs target in the dtype of x, which is {x.dtype}, not {target.dtype}.")
    dtype = compute_dtype(x, velocity)
    delta = sigma_difference("leap_update", ("sigma_to", "sigma_from"), sigma_to, sigma_from, x, dtype)
    if target is None:
        return step(x, velocity, delta, None, None), None
    latents, distance = _connect(x, velocity, delta, target.detach())
    return latents, distance
