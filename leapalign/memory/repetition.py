"""The seam where a simulation steps in: work that an iteration does over and over on tensors of the same shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Runner = Callable[..., Any]
"""``runner(function, *arguments, **options)``: returns what the function would, having run it or not."""
_RUNNER: ContextVar[Runner | None] = ContextVar("leapalign_runner", default=None)


def repeated(function: Callable[P, R]) -> Callable[P, R]:
    """Marks ``function``: within `run_by` another runs it."""

    @wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        runner = _RUNNER.get()
        if runner is None:
            return function(*arguments, **options)
        result: R = runner(function, *arguments, **options)
        return result

    return run


@contextlib.contextmanager
def run_by(runner: Runner) -> Iterator[None]:
    """Within the block ``runner`` is asked for what functions that are `repeated` return."""
    token = _RUNNER.set(runner)
    try:
        yield
    finally:
        _RUNNER.reset(token)
