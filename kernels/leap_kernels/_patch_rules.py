"""What `patch` knows of a class of modules, and how a function takes the place of a module's `forward`."""

from __future__ import annotations

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

Function = Callable[..., Any]


def of_forward(module: Any) -> tuple[Function, ...]:
    """Return what a rule replaces of a module, where that is its class's `forward` alone."""
    return (type(module).forward,)


class Rule(NamedTuple):
    """How modules of one class are patched."""

    name: str
    """Of the class."""
    digest: str
    """Of the source of what is replaced, as it was when `forward` was written."""
    ops: tuple[str, ...]
    """That `forward` calls."""
    forward: Function
    """`forward(module, *arguments, **options)` computes what the module's own would."""
    unsuitable: Callable[[Any], str | None] = lambda module: None
    """Say why `forward` does not fit a module, or return None."""
    sources: Callable[[Any], tuple[Function, ...]] = of_forward
    """Return the functions that are replaced."""
    bound: Callable[[Any], tuple[Any, ...]] = lambda module: ()
    """Return what `forward` takes before the module."""
    applies: Callable[[Any], bool] = lambda module: True
    """Say whether the rule is about this module: classes that serve many models hold different parts."""
    lacks: Callable[[Any], str | None] = lambda module: None
    """Say what a module lacks, so that its source is not the known one, or return None."""


def digest_of(functions: tuple[Function, ...]) -> str | None:
    """Return the digest of the functions' sources, or None where a source cannot be read."""
    digests = [_digest(function) for function in functions]
    if None in digests:
        return None
    return digests[0] if len(digests) == 1 else _shortened("".join(map(str, digests)))


@functools.cache
def _digest(function: Function) -> str | None:
    try:
        return _shortened(inspect.getsource(function))
    except (OSError, TypeError):
        return None


def _shortened(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Forward:
    """Stands in a module as its `forward`.

    The module is referred to weakly, or only the garbage collector would free it. Copies and pickles of the module have
    one of their own.
    """

    def __init__(self, function: Function, module: nn.Module) -> None:
        self.function = function
        self._module = weakref.ref(module)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.function(self._module(), *arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        module = self._module()
        assert module is not None
        return Forward(self.function, memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self.function, self._module())
