"""Registers the gradient of an op as an op of its own, which has none in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ._library import define


def define_gradient(signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an op as `define` does; to differentiate it is an error, where nothing would come back in silence."""
    name = signature.partition("(")[0]

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name} cannot be differentiated: leap_kernels has no gradients of gradients here. Compute this part in "
            "plain PyTorch."
        )

    return define(signature, run, fake, lambda ctx, inputs, output: None, refuse)
