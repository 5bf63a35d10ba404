"""The reward loss, weighted by how consistent the leaps are with the rollout.

    w    = 1 / sum_i max(distance_i, tau)                      (B,), detached
    loss = mean_b w_b * max(0, threshold - reward_b)           scalar

Backward, with g the gradient at `loss`: the gradient at reward_b is -g w_b / B where reward_b < threshold,
else 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._arguments import FLOATS, compute_dtype
from ._dispatch import choose, register, unsupported
from ._library import define
from ._triton import jit, tl

# ---- reference ---------------------------------------------------------------------------------------------


def reference_forward(reward: Tensor, distances: Tensor, threshold: float, tau: float) -> tuple[Tensor, Tensor]:
    """Compute loss and weights in plain PyTorch, from reward (B,) and distances (N, B) of one dtype."""
    weight = 1 / distances.detach().clamp(min=tau).sum(dim=0)
    return (weight * (threshold - reward).clamp(min=0)).mean(), weight


def reference_backward(grad: Tensor, reward: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """Return the gradient at reward (B,); three small operations, on every backend."""
    return torch.where(reward < threshold, -grad * weight / reward.shape[0], 0)


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK, WARPS = 128, 1


@jit
def loss_kernel(  # type: ignore[no-untyped-def]
    reward_ptr,
    distances_ptr,
    loss_ptr,
    weight_ptr,
    threshold,
    tau,
    batch,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program, whatever the batch: a handful of values in the time of one launch, in place of seven.
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, batch, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < batch
        sum_of_distances = tl.zeros([BLOCK], dtype=tl.float32)
        for row in tl.static_range(COUNT):
            distance = tl.load(distances_ptr + row * batch + at, mask=inside, other=1.0)
            # Comparisons that let a NaN through.
            sum_of_distances += tl.where(distance < tau, tau, distance)
        weight = 1 / sum_of_distances
        hinge = threshold - tl.load(reward_ptr + at, mask=inside, other=0.0)
        total += tl.where(inside, weight * tl.where(hinge < 0, 0.0, hinge), 0.0)
        tl.store(weight_ptr + at, weight, mask=inside)
    tl.store(loss_ptr, tl.sum(total) / batch)


def triton_forward(reward: Tensor, distances: Tensor, threshold: float, tau: float) -> tuple[Tensor, Tensor]:
    """Compute loss and weights with Triton; arguments as for `reference_forward`, in float32."""
    reward, distances = reward.contiguous(), distances.contiguous()
    loss, weight = reward.new_empty(()), torch.empty_like(reward)
    count, batch = distances.shape
    with torch.cuda.device_of(reward):
        loss_kernel[(1,)](
            reward, distances, loss, weight, float(threshold), float(tau), batch, count, BLOCK, num_warps=WARPS
        )
    return loss, weight


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(reward: Tensor, distances: Tensor, threshold: float, tau: float) -> tuple[Tensor, Tensor]:
    """Compute loss and weights with native/leap_native.cpp; arguments as for `reference_forward`, in float32."""
    reward, distances = reward.contiguous(), distances.contiguous()
    loss, weight = reward.new_empty(()), torch.empty_like(reward)
    _native.call("leap_weighted_loss", reward, distances, threshold, tau, loss, weight, *distances.shape)
    return loss, weight


# ---- dispatch and autograd ---------------------------------------------------------------------------------

_OP = register("consistency_weighted_loss", unsupported)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}


def _run(reward: Tensor, distances: Tensor, threshold: float, tau: float) -> tuple[Tensor, Tensor]:
    return _FORWARD[choose(_OP, reward, distances)](reward, distances, threshold, tau)


def _fake(reward: Tensor, distances: Tensor, threshold: float, tau: float) -> tuple[Tensor, Tensor]:
    return reward.new_empty(()), torch.empty_like(reward, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    reward, _, ctx.threshold, _ = inputs
    ctx.save_for_backward(reward, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    reward, weight = ctx.saved_tensors
    return reference_backward(grad, reward, weight, ctx.threshold), None, None, None


_loss = define(
    "consistency_weighted_loss(Tensor reward, Tensor distances, float threshold, float tau) -> (Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _backward,
)


def consistency_weighted_loss(
    reward: Tensor, distances: Tensor | Sequence[Tensor], threshold: float, tau: float
) -> tuple[Tensor, Tensor]:
    """Compute `mean_b w_b * max(0, threshold - reward_b)` with `w = 1 / sum_i max(distance_i, tau)`.

    The gradient reaches `reward` only; the weights are constants. Arithmetic is float32
    (float64 if a tensor is float64).

    Args:
        reward: (B,), float32, bfloat16, float16 or float64.
        distances: the leaps' distances: a sequence of N tensors (B,), one tensor (N, B), or one tensor (B,).
        threshold: rewards at or above it add nothing to the loss.
        tau: the least value of a distance, >= 0; above 0 it keeps every weight finite.

    Returns:
        The loss, a scalar, and the weights (B,), both float32 (float64 for float64 arithmetic).

    Raises:
        ValueError: on a wrong shape, dtype or device, an empty batch, no distance, or a negative `tau`.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    stacked = _stacked(reward, distances)
    if not tau >= 0:
        raise ValueError(f"consistency_weighted_loss needs tau >= 0, not {tau}.")
    dtype = compute_dtype(reward, stacked)
    loss, weight = _loss(reward.to(dtype), stacked.detach().to(dtype), threshold, tau)
    return loss, weight


def _stacked(reward: Tensor, distances: Tensor | Sequence[Tensor]) -> Tensor:
    """Check reward and distances, and return the distances as one tensor (N, B)."""
    if reward.ndim != 1 or reward.numel() == 0:
        raise ValueError(
            f"consistency_weighted_loss needs rewards of shape (B,) with B >= 1, not {tuple(reward.shape)}."
        )
    if isinstance(distances, Tensor):
        rows = list(distances.unbind()) if distances.ndim == 2 else [distances]
    else:
        rows = list(distances)
    if not rows:
        raise ValueError("consistency_weighted_loss needs at least one distance.")
    for row in rows:
        if row.shape != reward.shape or row.device != reward.device:
            raise ValueError(
                f"consistency_weighted_loss needs distances like the rewards, {tuple(reward.shape)} on "
                f"{reward.device}, not {tuple(row.shape)} on {row.device}."
            )
    if any(tensor.dtype not in FLOATS for tensor in (reward, *rows)):
        raise ValueError("consistency_weighted_loss takes float32, bfloat16, float16 and float64 tensors.")
    return torch.stack(rows)
