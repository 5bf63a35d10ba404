"""Copies between host memory and a device, beside what the device computes: streams, events and pinned memory.

On the CPU the same calls copy at once: the streams and events of `torch.cpu` do nothing.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from leapalign.inputs.validation import UserError

Event = Any
"""Of `torch.get_device_module(device)`: a point in the order of a stream's work."""

_PAGE = 4096


class Lane:
    """A stream of copies from or to ``device``: in the order they are asked for, beside other work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream(device)

    def device_memory(self, count: int, like: Tensor) -> Tensor:
        """``(count,)`` on the device in the dtype of ``like``, not initialised; once freed, it is reused only after
        this lane's copies."""
        memory = like.new_empty(count, device=self._device)
        if self._device.type == "cuda":
            memory.record_stream(self._stream)
        return memory

    def mark(self) -> Event:
        """The point that the device's own work, as far as it has been asked for, will have reached."""
        return self._recorded(self._backend.current_stream(self._device))

    @torch.no_grad()
    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        """Starts a copy when ``after`` is reached, and returns the point at which it is complete.

        Until then neither tensor may be freed or changed. Tensors in host memory are `pinned`, or the caller waits.
        """
        self._stream.wait_event(after)
        with self._backend.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._recorded(self._stream)

    def need(self, arrived: Event) -> None:
        """The device's own work waits from here on until ``arrived``; the caller does not."""
        self._backend.current_stream(self._device).wait_event(arrived)

    def finish(self) -> None:
        """Waits until all copies are complete."""
        self._recorded(self._stream).synchronize()

    def _recorded(self, stream: Any) -> Event:
        event = self._backend.Event()
        event.record(stream)
        return event


def pinned(count: int, like: Tensor, device: torch.device) -> Tensor:
    """``(count,)`` in host memory in the dtype of ``like``, not initialised, that a GPU reads and writes by itself.

    Raises UserError where the system does not allow so much of it.
    """
    if device.type != "cuda":
        return like.new_empty(count, device="cpu")
    # Registered, because PyTorch's allocator of pinned memory rounds up to a power of two; in pages of its own.
    size = count * like.element_size()
    pages = -(-size // _PAGE) * _PAGE
    room = torch.empty(pages + _PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % _PAGE
    address = room.data_ptr() + start
    error = int(torch.cuda.cudart().cudaHostRegister(address, pages, 0))
    if error:
        _forget_error(device)
        raise UserError(
            f"{size / 2**30:.1f} GiB of host memory cannot be pinned for the GPU (CUDA error {error}); free memory, or "
            "raise the limit on locked memory (ulimit -l)"
        )
    finalize(room.untyped_storage(), _unpin, address).atexit = False
    return room[start : start + size].view(like.dtype)


def _forget_error(device: torch.device) -> None:
    """Lets the next kernel run: CUDA reports the last error of any call at the launch after it, and then forgets it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)
        torch.cuda.synchronize(device)


def _unpin(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


class Background:
    """Runs functions in the order given, one at a time: on a thread of its own, or at once."""

    def __init__(self, threaded: bool) -> None:
        self._thread = ThreadPoolExecutor(1, "leapalign") if threaded else None

    def run(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        """Its result says when the function has returned, and raises what it raised."""
        if self._thread is not None:
            return self._thread.submit(function, *arguments)
        function(*arguments)
        return _returned()


def _returned() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


@dataclass
class _Buffer:
    memory: Tensor
    used: Future[None]
    """Returns when nothing reads the buffer any more."""


class ToHost:
    """Takes tensors of a device to functions that want them in host memory, while the device goes on.

    The functions run one after the other, in order. On the way a tensor lies in one of a few pinned ``buffers`` as
    large as the largest of ``tensors``, and of their dtype; where all are full, the caller waits.
    """

    def __init__(self, device: torch.device, tensors: Sequence[Tensor], buffers: int = 3) -> None:
        self._lane = Lane(device)
        self._background = Background(threaded=device.type != "cpu")
        largest = max(tensors, key=Tensor.numel).detach()
        self._buffers = [_Buffer(pinned(largest.numel(), largest, device), _returned()) for _ in range(buffers)]
        self._ring = itertools.cycle(self._buffers)

    def send(self, source: Tensor, use: Callable[[Tensor], object]) -> None:
        """Has ``use(values)`` called with the values of ``source`` in host memory, valid for that call.

        ``source`` must not change before `wait`. Raises what an earlier function raised.
        """
        buffer = next(self._ring)
        buffer.used.result()
        values = buffer.memory[: source.numel()].view(source.shape)
        arrived = self._lane.copy(values, source, after=self._lane.mark())
        buffer.used = self._background.run(_use, arrived, source, values, use)

    def wait(self) -> None:
        """Returns when all functions have; raises what one of them raised."""
        for buffer in self._buffers:
            buffer.used.result()


def _use(arrived: Event, source: Tensor, values: Tensor, use: Callable[[Tensor], object]) -> None:
    # Holds ``source``, which the allocator would give away while it is being copied.
    arrived.synchronize()
    with torch.no_grad():
        use(values)
