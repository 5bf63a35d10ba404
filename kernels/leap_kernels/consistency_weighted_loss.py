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
from torch.autograd.function import once_differentiable

from ._arguments import FLOATS, compute_dtype
from ._dispatch import choose, only_reference, register

_OP = register("consistency_weighted_loss", only_reference)


def reference_forward(reward: Tensor, distances: Tensor, threshold: float, tau: float) -> tuple[Tensor, Tensor]:
    """Compute loss and weights in plain PyTorch, from reward (B,) and distances (N, B) of one dtype."""
    weight = 1 / distances.detach().clamp(min=tau).sum(dim=0)
    return (weight * (threshold - reward).clamp(min=0)).mean(), weight


def reference_backward(grad: Tensor, reward: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """Return the gradient at reward (B,)."""
    return torch.where(reward < threshold, -grad * weight / reward.shape[0], 0)


class _ConsistencyWeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(reward: Tensor, distances: Tensor, threshold: float, tau: float) -> tuple[Tensor, Tensor]:
        return reference_forward(reward, distances, threshold, tau)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        reward, _, ctx.threshold, _ = inputs
        ctx.save_for_backward(reward, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        reward, weight = ctx.saved_tensors
        return reference_backward(grad, reward, weight, ctx.threshold), None, None, None


def consistency_weighted_loss(
    reward: Tensor, distances: Tensor | Sequence[Tensor], threshold: float, tau: float
) -> tuple[Tensor, Tensor]:
    """Compute `mean_b w_b * max(0, threshold - reward_b)` with `w = 1 / sum_i max(distance_i, tau)`.

    The gradient reaches `reward` only, once differentiable; the weights are constants. Arithmetic is float32
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
    choose(_OP, reward, stacked)
    dtype = compute_dtype(reward, stacked)
    loss, weight = _ConsistencyWeightedLoss.apply(reward.to(dtype), stacked.to(dtype), threshold, tau)
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
