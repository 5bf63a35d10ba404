"""The surrogate trajectory and its staged backward pass: one velocity graph alive at a time.

Connectors pin every forward value of the surrogate to the rollout, so its graph never has to be built. With
``lam = dL/dx_T``, rows are visited from the image back to the noise:

    u_r = coefficient_r * lam
    q_r = J_x(v_r)^T u_r            (parameter gradients come out of the same backward)
    lam = lam + discount_r * q_r

which gives exactly the gradients of the in-line graph (LeapAlign, arXiv 2604.15311, eq. 4-10).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from leapalign.rollout import Rollout, VelocityFn

GradientSink = Callable[[Tensor, Tensor], None]
"""``sink(parameter, gradient)``: called the moment a backward has completed a parameter's gradient."""


@runtime_checkable
class ConditionedVelocity(Protocol):
    """A velocity function bound to per-sample conditions, of which a micro-batch needs only some."""

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor: ...

    def select(self, samples: Tensor) -> VelocityFn:
        """The same function for the given batch positions ``(N,)`` int64, repeats allowed."""
        ...


@dataclass(frozen=True)
class SurrogatePlan:
    """Which velocities carry gradient, and how much.

    index: ``(K, B)`` int64, the sampling step of each row and sample; rows strictly ascending (noise to image).
    coefficient: ``(K, B)`` float32, the derivative of the surrogate's end point with respect to the row's velocity.
    discount: ``(K,)`` float32, the share of gradient that passes through the row's input to the rows before it.

    Methods make both float64 from float64 sigmas: 0.3 in float32 alone is an error of 4e-8.

    Raises ValueError for wrong shapes, unordered or negative indices and non-finite numbers.
    """

    index: Tensor
    coefficient: Tensor
    discount: Tensor

    def __post_init__(self) -> None:
        if self.index.dim() != 2 or 0 in self.index.shape:
            raise ValueError(f"plan index must have shape (rows, batch), got {tuple(self.index.shape)}")
        if self.index.dtype != torch.int64:
            raise ValueError(f"plan index must be int64, got {self.index.dtype}")
        if self.coefficient.shape != self.index.shape:
            raise ValueError(
                f"plan coefficient must have the shape of index, {tuple(self.index.shape)}, "
                f"got {tuple(self.coefficient.shape)}"
            )
        if self.discount.shape != self.index.shape[:1]:
            raise ValueError(f"plan discount must have shape ({len(self.index)},), got {tuple(self.discount.shape)}")
        if not bool(self.coefficient.isfinite().all() and self.discount.isfinite().all()):
            raise ValueError("plan coefficients and discounts must be finite")
        if bool((self.index < 0).any()):
            raise ValueError("plan indices must not be negative")
        if bool((self.index.diff(dim=0) <= 0).any()):
            raise ValueError("plan rows must be in sampling order: each index above that of the row before")


def surrogate_backward(
    plan: SurrogatePlan,
    rollout: Rollout,
    velocity_fn: VelocityFn,
    x0_gradient: Tensor,
    *,
    microbatch: int | None = None,
    gradient_sink: GradientSink | None = None,
) -> Tensor:
    """Accumulates the surrogate's parameter gradients into ``.grad``, one velocity graph at a time.

    Args:
        plan: rows, for the rollout's batch of B samples.
        rollout: the trajectory whose latents the velocities are evaluated at; weights unchanged since.
        velocity_fn: ``(latents (N, ...), sigma (N,)) -> velocity (N, ...)``. A plain function is called with one
            row at a time, all B samples in order (fewer if ``microbatch`` is smaller). A `ConditionedVelocity`
            is asked for the samples of each part, and rows that share a cotangent may run as one batch.
        x0_gradient: ``dL/dx_T``, ``(B, ...)``, the shape of one latent of the rollout.
        microbatch: most samples in one forward; None: B.
        gradient_sink: takes over parameter gradients as they complete; ``.grad`` is left None.

    Returns:
        ``(K, B)`` float32 norms of the gradient terms, ``|u_r|``.

    Raises ValueError, before any forward, for a plan or gradient that does not fit the rollout.
    """
    _check(plan, rollout, x0_gradient, microbatch)
    batch = rollout.batch_size
    conditioned = velocity_fn if isinstance(velocity_fn, ConditionedVelocity) else None
    size = microbatch or batch
    lam = x0_gradient.to(torch.promote_types(x0_gradient.dtype, torch.float32))
    norms = torch.zeros(plan.index.shape, dtype=torch.float32)
    for group in _row_groups(plan.discount.tolist(), whole=conditioned is None):
        coefficient = plan.coefficient[group].to(lam)
        cotangent = coefficient.view(*coefficient.shape, *[1] * (lam.dim() - 1)) * lam
        norms[group] = cotangent.flatten(2).norm(dim=2).float().cpu()
        cotangent = cotangent.flatten(0, 1)
        discount = float(plan.discount[group[0]]) if group[0] > 0 else 0.0
        nested = []
        for part in torch.arange(len(cotangent)).split(size):
            samples, steps = part % batch, plan.index[group].flatten()[part]
            q = _velocity_vjp(
                conditioned.select(samples) if conditioned else velocity_fn,
                rollout.latents[steps, samples],
                rollout.sigmas[steps].to(lam.device),
                cotangent[part],
                needs_input=discount != 0 and int(part[0]) < batch,
                gradient_sink=gradient_sink,
            )
            if q is not None:
                nested.append(q.to(lam.dtype))
        if nested:
            # Only the group's first row passes gradient on; what a part computed beyond it is dropped.
            lam = lam + discount * torch.cat(nested)[:batch]
    return norms


def _check(plan: SurrogatePlan, rollout: Rollout, x0_gradient: Tensor, microbatch: int | None) -> None:
    if plan.index.shape[1] != rollout.batch_size:
        raise ValueError(f"the plan is for {plan.index.shape[1]} samples, the rollout has {rollout.batch_size}")
    if int(plan.index.max()) >= rollout.num_steps:
        raise ValueError(
            f"plan index {int(plan.index.max())} is out of range for a rollout of {rollout.num_steps} steps"
        )
    if x0_gradient.shape != rollout.latents.shape[1:]:
        raise ValueError(
            f"x0_gradient must have the shape of one latent, {tuple(rollout.latents.shape[1:])}, "
            f"got {tuple(x0_gradient.shape)}"
        )
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch must be at least 1, got {microbatch}")


def _row_groups(discount: list[float], whole: bool) -> Iterator[list[int]]:
    """Rows that share one ``lam``, last first: a row with a discount ends its group, as the first member.

    ``whole``: every row is a group of its own.
    """
    group: list[int] = []
    for row in reversed(range(len(discount))):
        group.insert(0, row)
        if whole or row == 0 or discount[row] != 0:
            yield group
            group = []


def _velocity_vjp(
    velocity_fn: VelocityFn,
    latents: Tensor,
    sigma: Tensor,
    cotangent: Tensor,
    needs_input: bool,
    gradient_sink: GradientSink | None,
) -> Tensor | None:
    """Backward through ``velocity_fn``; returns ``J_x^T cotangent`` where ``needs_input``."""
    with torch.enable_grad():
        latents = latents.detach().requires_grad_(needs_input)
        velocity = velocity_fn(latents, sigma)
    if gradient_sink is None:
        torch.autograd.backward(velocity, cotangent.to(velocity.dtype))
        return latents.grad
    hooks = [
        parameter.register_post_accumulate_grad_hook(_hand_over(gradient_sink))
        for parameter in _leaves(velocity)
        if parameter is not latents
    ]
    try:
        torch.autograd.backward(velocity, cotangent.to(velocity.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return latents.grad


def _hand_over(gradient_sink: GradientSink) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        gradient_sink(parameter, gradient)

    return hook


def _leaves(output: Tensor) -> list[Tensor]:
    """The leaf tensors that the graph of ``output`` accumulates gradients into."""
    found, seen, stack = [], set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(following for following, _ in node.next_functions)
    return found
