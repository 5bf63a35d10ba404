"""Progress bars: on stderr, one at a time, and none where that is no terminal but a log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_open: list[Any] = []
"""Bars from the outermost in; the last one is drawn."""


@contextlib.contextmanager
def progress(description: str, total: float, unit: str, done: float = 0) -> Iterator[Any]:
    """Tqdm's bar over ``total`` of a ``unit``, of which ``done`` are there already.

    A bar within another one takes its place on the screen, and gives it back at the end.
    """
    outer = _open[-1] if _open else None
    if outer is not None:
        outer.clear()
    shape = {"position": 0, "leave": outer is None, "dynamic_ncols": True}
    with tqdm(desc=description, total=total, initial=done, unit=unit, file=sys.stderr, disable=None, **shape) as bar:
        _open.append(bar)
        try:
            yield bar
        finally:
            # By identity: to tqdm, bars in the same place are equal.
            _open[:] = [other for other in _open if other is not bar]
    if outer is not None:
        outer.refresh()


def say(line: str) -> None:
    """Writes ``line`` to stderr, above the bar."""
    tqdm.write(line, file=sys.stderr)
