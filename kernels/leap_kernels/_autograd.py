"""Gives a custom op its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def differentiable(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Register the backward pass of a custom op, and return a function that calls the op.

    `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` are as for `torch.autograd.Function`. The
    function also runs under the transforms of `torch.func` (vjp, grad, jacrev, vmap): those cannot differentiate
    custom ops, but can a Function around one.
    """
    op.register_autograd(backward, setup_context=setup_context)
    methods = {
        "forward": staticmethod(lambda *arguments: op(*arguments)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    function: Any = type("CustomOp", (torch.autograd.Function,), methods)

    def call(*arguments: Any) -> Any:
        # A Function costs twenty microseconds more, so only where it must be.
        return (function.apply if torch._C._are_functorch_transforms_active() else op)(*arguments)

    return call
