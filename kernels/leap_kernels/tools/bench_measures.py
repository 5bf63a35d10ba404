"""What `bench` measures of a call: its time, the memory it takes at its peak, and how far its result is off."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# More than any GPU's cache; writing it also keeps the GPU busy while the measured call is being launched.
_FLUSH_BYTES = 512 << 20
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_CALL = "leap_kernels: measured call"


def keep_freed_memory() -> None:
    """Let glibc reuse what is freed instead of handing it back to the system, as allocators for GPUs do.

    Fresh pages cost more than most of the calls measured here, and whether a call gets some is chance. Other C
    libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)


class Clock:
    """Times calls on one device, and for a GPU with its cache flushed before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if on_gpu else None

    def seconds(self, call: Callable[[], T]) -> tuple[float, T]:
        """Return the seconds that a call took, and its result."""
        if self._flush is None:
            started = time.perf_counter()
            result = call()
            return time.perf_counter() - started, result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result


def peak_bytes(prepare: Callable[[], T], call: Callable[[T], object], device: torch.device) -> int:
    """Return the most bytes of tensors that `call(prepare())` held at a time, beyond those that were there before."""
    if device.type == "cuda":
        prepared = prepare()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(prepared)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler sees what PyTorch's allocator hands out to any code, compiled code included; its log does not help.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        prepared = prepare()
        with torch.profiler.record_function(_CALL):
            call(prepared)
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    started = next(event.start_ns() for event in events if event.name() == _CALL)
    held = peak = 0
    for event in events:
        # What was prepared may be freed meanwhile, which makes room for more.
        if event.name() == "[memory]" and event.start_ns() >= started:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest absolute error of any result, over the largest magnitude of its exact value."""
    worst = 0.0
    for result, expected in zip(results, exact, strict=True):
        expected = expected.double()
        error = (result.double() - expected).abs().max() / expected.abs().max()
        worst = max(worst, error.item())
    return worst
