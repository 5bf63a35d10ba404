"""The backward pass through one velocity: its vector-Jacobian product, one branch's graph alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from leapalign.memory.repetition import repeated
from leapalign.rollout import VelocityFn
from leapalign.storage.faults import point

GradientSink = Callable[[Tensor, Tensor], None]
"""``sink(parameter, gradient)``: called the moment a backward has completed a parameter's gradient."""


@runtime_checkable
class ConditionedVelocity(Protocol):
    """A velocity function bound to per-sample conditions, of which a micro-batch needs only some."""

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor: ...

    def select(self, samples: Tensor) -> ConditionedVelocity:
        """The same function for the given batch positions ``(N,)`` int64, repeats allowed."""
        ...


@runtime_checkable
class BranchedVelocity(ConditionedVelocity, Protocol):
    """A combination of velocities that are differentiated one after the other."""

    def branches(self, latents: Tensor, sigma: Tensor, cotangent: Tensor) -> Sequence[tuple[VelocityFn, Tensor]]:
        """Velocities and their cotangents, whose vector-Jacobian products add up to that of the combination."""
        ...


@repeated
def velocity_vjp(
    velocity_fn: VelocityFn,
    latents: Tensor,
    sigma: Tensor,
    cotangent: Tensor,
    needs_input: bool,
    only_input: bool,
    gradient_sink: GradientSink | None,
) -> Tensor | None:
    """Backward through ``velocity_fn`` at ``latents (n, ...)`` and ``sigma (n,)``, branch by branch.

    Returns ``J_x^T cotangent`` where ``needs_input``. only_input: parameters get no gradient.
    """
    latents = latents.detach().requires_grad_(needs_input)
    branches: Sequence[tuple[VelocityFn, Tensor]] = [(velocity_fn, cotangent)]
    if isinstance(velocity_fn, BranchedVelocity):
        branches = velocity_fn.branches(latents, sigma, cotangent)
    for branch, share in branches:
        point("surrogate")
        with torch.enable_grad():
            velocity = branch(latents, sigma)
        hooks = []
        if gradient_sink is not None and not only_input:
            parameters = [leaf for leaf in _leaves(velocity) if leaf is not latents]
            hooks = [p.register_post_accumulate_grad_hook(_hand_over(gradient_sink)) for p in parameters]
        try:
            torch.autograd.backward(velocity, share.to(velocity.dtype), inputs=[latents] if only_input else None)
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
