"""Stopping in good order: SIGTERM and Ctrl-C let the iteration end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from leapalign.parallel.processes import first

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM or Ctrl-C has come; a Ctrl-C after that interrupts as ever.

    Outside the main thread, where Python has no signals, none ever comes.
    """
    requested: list[int] = []

    def request(number: int, frame: FrameType | None) -> None:
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested.append(number)
        if not first():
            return
        # Not print: the signal may have come within one.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this iteration; Ctrl-C stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = [signal.signal(number, request) for number in _SIGNALS]
    try:
        yield lambda: bool(requested)
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
