"""Streams on the CPU whose copies happen as late as events allow: what `torch.get_device_module` could return.

The device's own work is done at once; a copy on another stream waits in a queue until somebody waits for an event
behind it. Code that reads a copy, or changes its source, without waiting then computes something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    """``asked`` copies were put into it, ``done`` of them have happened."""

    def __init__(self, *_: Any) -> None:
        self.queue: list[Callable[[], Any]] = []
        self.asked = self.done = 0

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def catch_up(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            self.queue.pop(0)()


class Event:
    def record(self, stream: Stream) -> None:
        self.stream, self.position, self.time = stream, stream.asked, len(LateStreams.log)

    def synchronize(self) -> None:
        self.stream.catch_up(self.position)


class _Queued(TorchDispatchMode):
    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self.stream.asked += 1
        self.stream.queue.append(lambda: func(*args))
        return args[0]


class LateStreams:
    """``log``: what a test notes of the order of work; events know how much of it came before them."""

    Stream, Event = Stream, Event
    log: ClassVar[list[Any]] = []
    own = Stream()

    @classmethod
    def current_stream(cls, device: torch.device) -> Stream:
        return cls.own

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        with _Queued(stream):
            yield
