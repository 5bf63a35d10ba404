"""Registers ops with torch.library, so that compiled graphs, fake tensors and autograd know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# A copy of this package under another name has ops of its own.
_NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def qualified(name: str) -> str:
    """Return the name of an op in `torch.ops`."""
    return f"{_NAMESPACE}::{name}"


def define(
    signature: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define an op that neither changes nor returns its arguments, and return a function that calls it.

    Written for the low-level interface, which costs half the time of a call through `torch.library.custom_op`.

    Args:
        signature: name, arguments and results, in the language of PyTorch's schemas.
        run: computes the op on real tensors.
        fake: returns empty tensors like those that `run` would.
        setup_context: saves what `backward` needs, as in `torch.autograd.Function`; None without a backward pass.
        backward: returns the gradients, likewise.
    """
    name = signature.partition("(")[0]
    _LIBRARY.define(signature)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified(name), fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(getattr(torch.ops, _NAMESPACE), name).default
    if backward is None or setup_context is None:
        return op
    torch.library.register_autograd(qualified(name), backward, setup_context=setup_context, lib=_LIBRARY)
    with_gradients = differentiable(op, setup_context, backward)

    def call(*arguments: Any) -> Any:
        # Compiled code takes the op as it is.
        as_it_is = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        return (op if as_it_is else with_gradients)(*arguments)

    return call


def differentiable(
    compute: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that computes with the given backward pass, also under the transforms of `torch.func`.

    Those cannot differentiate an op registered from Python, but can a `torch.autograd.Function` with a
    `setup_context`. Such a one, and the registered op likewise, costs three times as much as a Function whose
    `forward` has the context: the difference is as long as a kernel runs on a small image.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = compute(*arguments)
        setup_context(ctx, arguments, output)
        return output

    transformable = {
        "forward": staticmethod(lambda *arguments: compute(*arguments)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    eager = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    in_transforms: Any = type("OpInTransforms", (torch.autograd.Function,), transformable)
    in_eager: Any = type("Op", (torch.autograd.Function,), eager)

    def call(*arguments: Any) -> Any:
        return (in_transforms if torch._C._are_functorch_transforms_active() else in_eager).apply(*arguments)

    return call
