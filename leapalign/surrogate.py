"""The surrogate trajectory and its staged backward pass: one velocity graph alive at a time.

Connectors pin every forward value of the surrogate to the rollout, so its graph never has to be built. With
``lam = dL/dx_T``, rows are visited from the image back to the noise:

    u_r = coefficient_r * lam
    q_r = J_x(v_r)^T u_r            (parameter gradients come out of the same backward)
    lam = lam + discount_r * q_r

which gives exactly the gradients of the in-line graph (LeapAlign, arXiv 2604.15311, eq. 4-10). Where a velocity
combines several branches (classifier-free guidance), each gets its share of ``u_r``, and one branch's graph is alive at
a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from leap_kernels import combine_gradient_terms
from torch import Tensor

from leapalign.parallel.processes import gathered
from leapalign.rollout import Rollout, VelocityFn, picked
from leapalign.velocity_backward import BranchedVelocity, ConditionedVelocity, GradientSink, velocity_vjp

__all__ = ["BranchedVelocity", "ConditionedVelocity", "GradientSink", "SurrogatePlan", "surrogate_backward"]


@dataclass(frozen=True)
class SurrogatePlan:
    """Which velocities carry gradient, and how much.

    index: ``(K, N)`` int64, the sampling step of each row and column; rows strictly ascending (noise to image). N is
        the rollout's batch B, or M B for M draws on one rollout: column n belongs to sample ``n % B``.
    coefficient: ``(K, N)`` float32, the derivative of the surrogate's end point with respect to the row's velocity.
        A column with coefficient 0 has no part in the row, and its index there may be any.
    discount: ``(K,)`` float32, the share of gradient that passes through the row's input to the rows before it.
    max_ratio: discounts shrink, column by column, until ``|q_r| <= max_ratio |lam|``; None: they stay.

    Methods make both float64 from float64 sigmas: 0.3 in float32 alone is an error of 4e-8.

    Raises ValueError for wrong shapes, unordered or negative indices, non-finite numbers and a negative ratio.
    """

    index: Tensor
    coefficient: Tensor
    discount: Tensor
    max_ratio: float | None = None

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
        if self.max_ratio is not None and not 0 <= self.max_ratio < float("inf"):
            raise ValueError(f"plan max_ratio must be a number of at least 0, got {self.max_ratio}")
        # The highest active step so far, and what each active step has to exceed.
        active = self.coefficient != 0
        highest = self.index.where(active, -1).cummax(dim=0).values
        if bool((active[1:] & (self.index[1:] <= highest[:-1])).any()):
            raise ValueError("plan rows must be in sampling order: each index above that of the row before")


def surrogate_backward(
    plan: SurrogatePlan,
    rollout: Rollout,
    velocity_fn: VelocityFn,
    x0_gradient: Tensor,
    *,
    microbatch: int | None = None,
    gradient_sink: GradientSink | None = None,
    applied_discount: Tensor | None = None,
    velocity_gradient: Tensor | None = None,
) -> Tensor:
    """Accumulates the surrogate's parameter gradients into ``.grad``, one velocity graph at a time.

    Args:
        plan: rows of N columns, N a multiple of the rollout's batch B.
        rollout: the trajectory whose latents the velocities are evaluated at; weights unchanged since.
        velocity_fn: ``(latents (n, ...), sigma (n,)) -> velocity (n, ...)``. A plain function is called with one
            row at a time, all B samples in order (fewer if ``microbatch`` is smaller). A `ConditionedVelocity`
            is asked for the samples of each part, and rows and draws that share a cotangent may run as one batch.
        x0_gradient: ``dL/dx_T``, ``(N, ...)``, the shape of one latent of the rollout.
        microbatch: most samples in one forward; None: B.
        gradient_sink: takes over parameter gradients as they complete; ``.grad`` is left None.
        applied_discount: ``(K, N)``, filled with the discount that each row's input really got: below the plan's
            where ``max_ratio`` shrank it, 0 where nothing came back to discount.
        velocity_gradient: ``(K, N, ...)``, what a loss of the velocities themselves adds to ``u_r``. It reaches the
            parameters, and no input: ``q_r`` and ``lam`` are without it. A row whose input passes gradient on has one
            more forward for that, the others none.

    Returns:
        ``(K, N)`` float32 norms of the gradient terms, ``|u_r|``.

    Raises ValueError, before any forward, for a plan or gradient that does not fit the rollout.
    """
    _check(plan, rollout, x0_gradient, microbatch, applied_discount, velocity_gradient)
    batch = rollout.batch_size
    conditioned = velocity_fn if isinstance(velocity_fn, ConditionedVelocity) else None
    lam = x0_gradient.to(torch.promote_types(x0_gradient.dtype, torch.float32))
    # Each goes to the device, or comes from it, once: every copy has the host wait.
    coefficients, levels = plan.coefficient.to(lam), rollout.sigmas.to(lam.device)
    norms = torch.zeros(plan.index.shape, dtype=torch.float32, device=lam.device)
    shares: dict[int, Tensor] = {}
    if applied_discount is not None:
        applied_discount.zero_()
    for group in _row_groups(plan.discount.tolist(), whole=conditioned is None):
        # A group's rows follow one another.
        rows_of_group = slice(group[0], group[-1] + 1)
        coefficient = coefficients[rows_of_group]
        cotangent = coefficient.view(*coefficient.shape, *[1] * (lam.dim() - 1)) * lam
        norms[rows_of_group] = cotangent.flatten(2).norm(dim=2).float()
        discount = float(plan.discount[group[0]]) if group[0] > 0 else 0.0
        # Entries (row, column), row by row. A plain function wants all of them.
        active = plan.coefficient[group] != 0 if conditioned else torch.ones(len(group), plan.index.shape[1])
        entries = active.nonzero()
        nested = torch.zeros_like(lam) if discount else None
        parts = entries.split(microbatch or batch) if len(entries) else ()
        idle = max(gathered(len(parts))) - len(parts)
        for part in parts:
            rows, columns = part.unbind(dim=1)
            # Only the group's first row passes gradient on.
            count = int((rows == 0).sum()) if nested is not None else 0
            q = _part_vjp(
                conditioned or velocity_fn,
                rollout.latents,
                levels,
                plan.index[group][rows, columns],
                columns % batch,
                picked(cotangent, rows, columns),
                picked(velocity_gradient[rows_of_group], rows, columns).to(lam)
                if velocity_gradient is not None
                else None,
                count,
                gradient_sink,
            )
            if q is not None and nested is not None:
                for column, term in zip(columns[:count].tolist(), q.to(lam.dtype), strict=False):
                    nested[column] = term
        for _ in range(idle):
            _go_along(velocity_fn, rollout.latents, levels, lam, gradient_sink)
        if nested is not None:
            lam, direct_norm, nested_norm = combine_gradient_terms(lam, nested, 1.0, discount, plan.max_ratio)
            if applied_discount is not None:
                shrunk = 1.0 if plan.max_ratio is None else (plan.max_ratio * direct_norm / nested_norm).clamp(max=1)
                shares[group[0]] = (discount * shrunk * (nested_norm > 0)).nan_to_num(0.0)
    if applied_discount is not None and shares:
        applied_discount[list(shares)] = torch.stack(list(shares.values())).to(applied_discount)
    return norms.cpu()


def _check(
    plan: SurrogatePlan,
    rollout: Rollout,
    x0_gradient: Tensor,
    microbatch: int | None,
    applied_discount: Tensor | None,
    velocity_gradient: Tensor | None,
) -> None:
    columns = plan.index.shape[1]
    if columns % rollout.batch_size:
        raise ValueError(f"the plan is for {columns} samples, the rollout has {rollout.batch_size}")
    if int(plan.index.max()) >= rollout.num_steps:
        raise ValueError(
            f"plan index {int(plan.index.max())} is out of range for a rollout of {rollout.num_steps} steps"
        )
    if x0_gradient.shape != (columns, *rollout.latents.shape[2:]):
        raise ValueError(
            f"x0_gradient must have the shape of {columns} latents, {(columns, *rollout.latents.shape[2:])}, "
            f"got {tuple(x0_gradient.shape)}"
        )
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch must be at least 1, got {microbatch}")
    if applied_discount is not None and applied_discount.shape != plan.index.shape:
        raise ValueError(
            f"applied_discount must have the shape of the plan's index, {tuple(plan.index.shape)}, "
            f"got {tuple(applied_discount.shape)}"
        )
    of_rows = (len(plan.index), *x0_gradient.shape)
    if velocity_gradient is not None and velocity_gradient.shape != of_rows:
        raise ValueError(
            f"velocity_gradient must have the shape of x0_gradient for each row, {of_rows}, "
            f"got {tuple(velocity_gradient.shape)}"
        )


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


def _go_along(
    velocity_fn: VelocityFn, latents: Tensor, levels: Tensor, lam: Tensor, gradient_sink: GradientSink | None
) -> None:
    """A part that adds nothing: weights may be spread over processes, which gather them together, and a process with
    less to do has to take part."""
    entry = torch.zeros(1, dtype=torch.int64)
    _part_vjp(velocity_fn, latents, levels, entry, entry, torch.zeros_like(lam[:1]), None, 0, gradient_sink)


def _part_vjp(
    velocity_fn: VelocityFn,
    latents: Tensor,
    levels: Tensor,
    steps: Tensor,
    samples: Tensor,
    cotangent: Tensor,
    beside: Tensor | None,
    passing: int,
    gradient_sink: GradientSink | None,
) -> Tensor | None:
    """`velocity_vjp` of a part's entries, of which the first ``passing`` pass gradient on through their inputs.

    latents, levels: of the whole rollout; entry n is sample ``samples[n]`` of step ``steps[n]``, both in host memory.
    beside: what parameters get beside ``cotangent``, and inputs do not.
    """

    def vjp(count: int, cotangent: Tensor, needs_input: bool, only_input: bool) -> Tensor | None:
        of = samples[:count]
        return velocity_vjp(
            velocity_fn.select(of) if isinstance(velocity_fn, ConditionedVelocity) else velocity_fn,
            picked(latents, steps[:count], of),
            torch.stack([levels[step] for step in steps[:count].tolist()]),
            cotangent[:count],
            needs_input=needs_input,
            only_input=only_input,
            gradient_sink=gradient_sink,
        )

    if beside is None:
        return vjp(len(samples), cotangent, needs_input=passing > 0, only_input=False)
    # One graph walked twice would serve, but compiled and selectively recomputed blocks can be walked once.
    q = vjp(passing, cotangent, needs_input=True, only_input=True) if passing else None
    vjp(len(samples), cotangent + beside, needs_input=False, only_input=False)
    return q
