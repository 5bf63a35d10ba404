"""Registers ops with torch.library, so that compiled graphs, fake tensors and autograd know them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ._dispatch import native_library
from ._shards import Unit, on_parts, spread

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
    jvp: Callable[..., Any] | None = None,
    unit: Unit = "batch",
    native: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define an op that neither changes nor returns its arguments, and return a function that calls it.

    Written for the low-level interface, which costs half the time of a call through `torch.library.custom_op`.

    Args:
        signature: name, arguments and results, in the language of PyTorch's schemas.
        run: computes the op on real tensors.
        fake: returns empty tensors like those that `run` would.
        setup_context: saves what `backward` needs, as in `torch.autograd.Function`; None without a backward pass.
        backward: returns the gradients, likewise.
        jvp: returns the forward-mode derivatives, likewise; compiled code has none.
        unit: what can be computed by itself, of tensors that are spread over processes.
        native: what `run` would come to call for arguments that the native library calls plain.
    """
    op = _defined(signature, run, fake)
    name = signature.partition("(")[0]

    def compute(*arguments: Any) -> Any:
        library = native_library()
        if library is not None and library.plain(arguments):
            return run(*arguments) if native is None else native(*arguments)
        if not _observed(arguments):
            return run(*arguments)
        return on_parts(name, unit, compute, arguments) if spread(arguments) else op(*arguments)

    with_gradients = compute
    if backward is not None and setup_context is not None:
        torch.library.register_autograd(qualified(name), backward, setup_context=setup_context, lib=_LIBRARY)
        with_gradients = _differentiable(name, compute, setup_context, backward, jvp)

    def call(*arguments: Any) -> Any:
        # Compiled code takes the op as it is.
        if is_compiling():
            return op(*arguments)
        return (with_gradients if torch.is_grad_enabled() else compute)(*arguments)

    return call


def define_in_place(
    signature: str,
    run: Callable[..., None],
    written: int = 1,
    unit: Unit = "batch",
    check: Callable[..., None] = lambda *_: None,
    at_once: str = "",
) -> Callable[..., None]:
    """Define an op that returns nothing, and return a function that calls it.

    Args:
        signature: name and arguments, in the language of PyTorch's schemas.
        run: computes the op on real tensors.
        written: how many arguments, from the first on, it writes into.
        unit: as for `define`.
        check: raises where arguments are wrong that `at_once` did not take.
        at_once: a function of the native library that does all of it, and says whether it could.
    """
    op = _defined(signature, run, lambda *_: None)
    name = signature.partition("(")[0]

    def call(*arguments: Any) -> None:
        if is_compiling():
            check(*arguments)
            op(*arguments)
            return
        library = native_library() if at_once else None
        if library is not None and getattr(library, at_once)(arguments):
            return
        check(*arguments)
        if _observed(arguments):
            if spread(arguments):
                on_parts(name, unit, call, arguments)
            else:
                op(*arguments)
            return
        if torch.is_grad_enabled():
            with torch.no_grad():
                run(*arguments)
        else:
            run(*arguments)
        # So that autograd notices, as it does after any op in place, if it had saved a tensor.
        torch.autograd.graph.increment_version(tuple(_tensors(arguments[:written])))

    return call


def _defined(signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    name = signature.partition("(")[0]
    _LIBRARY.define(signature)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified(name), fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(getattr(torch.ops, _NAMESPACE), name).default
    return op


def _observed(arguments: tuple[Any, ...]) -> bool:
    """Say whether PyTorch's dispatcher has to see the op: for a dispatch mode, a profiler or a tensor of another kind.

    Otherwise computing at once saves the way through it, which takes as long as a kernel on a small image.
    """
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._autograd._profiler_enabled():
        return True
    for argument in arguments:
        if argument is None:
            continue
        if isinstance(argument, Tensor):
            if torch._C._dispatch_keys(argument).raw_repr() not in _PLAIN and not _plain(argument):
                return True
        elif type(argument) is list and any(_observed((item,)) for item in argument if isinstance(item, Tensor)):
            return True
    return False


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and those in lists of tensors."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
            yield from argument


_PLAIN: set[int] = set()
"""Dispatch keys of tensors that are just memory, of the devices that have been met."""


def _plain(tensor: Tensor) -> bool:
    """Say whether a tensor is just memory: no wrapper, no lazy view, no subclass."""
    with torch.inference_mode(False):
        keys = torch._C._dispatch_keys(torch.empty(0, device=tensor.device)).raw_repr()
    _PLAIN.add(keys)
    return torch._C._dispatch_keys(tensor).raw_repr() == keys


def _differentiable(
    name: str,
    compute: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """Return a function that computes with the given derivatives, also under the transforms of `torch.func`.

    Those cannot differentiate an op registered from Python, but can a `torch.autograd.Function` with a
    `setup_context`. Such a one, and the registered op likewise, costs three times as much as a Function whose
    `forward` has the context: the difference is as long as a kernel runs on a small image.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = compute(*arguments)
        setup_context(ctx, arguments, output)
        return output

    derivatives = {"backward": staticmethod(backward)}
    if jvp is not None:
        derivatives["jvp"] = staticmethod(jvp)
    transformable = {
        "forward": staticmethod(lambda *arguments: compute(*arguments)),
        "setup_context": staticmethod(setup_context),
        "generate_vmap_rule": True,
    }
    # What errors, profiles and anomaly mode name.
    title = name.title().replace("_", "")
    in_transforms: Any = type(title, (torch.autograd.Function,), {**transformable, **derivatives})
    in_eager: Any = type(title, (torch.autograd.Function,), {"forward": staticmethod(forward), **derivatives})

    def call(*arguments: Any) -> Any:
        return (in_transforms if torch._C._are_functorch_transforms_active() else in_eager).apply(*arguments)

    return call
