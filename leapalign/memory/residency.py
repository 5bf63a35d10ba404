"""Where tensors live. Code says what it makes is for, and the ledger, which cannot see it on a CPU, believes it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Literal, TypeVar

T = TypeVar("T")

Role = Literal["weights", "gradients", "optimizer", "average", "activations", "reward", "latents"]

Stage = Literal["rollout", "reward", "surrogate", "optimizer", "sampling", "watch", "saving", "setup"]
"""Four of an iteration, three between iterations, and what comes before all."""

HOST: ContextVar[bool] = ContextVar("leapalign_host", default=False)
ROLE: ContextVar[Role] = ContextVar("leapalign_role", default="activations")
STAGE: ContextVar[Stage] = ContextVar("leapalign_stage", default="setup")


@contextlib.contextmanager
def host_memory(role: Role) -> Iterator[None]:
    """What the block makes lives in host memory."""
    with _set(HOST, True), made_for(role):
        yield


@contextlib.contextmanager
def made_for(role: Role) -> Iterator[None]:
    """What the block makes is for ``role``; of two such blocks, the inner one says so."""
    with _set(ROLE, role):
        yield


@contextlib.contextmanager
def _set(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


WATCH: ContextVar[Callable[[Stage], contextlib.AbstractContextManager[None]]] = ContextVar("leapalign_watch")
"""Where set, entered around each stage: what measures them."""


@contextlib.contextmanager
def stage(name: Stage) -> Iterator[None]:
    """Names the part of a run that the block is."""
    watch = WATCH.get(None)
    with _set(STAGE, name), watch(name) if watch else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def watched(watch: Callable[[Stage], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Has ``watch`` called for each stage that begins in the block, after those of blocks around it."""
    outer = WATCH.get(None)

    @contextlib.contextmanager
    def both(name: Stage) -> Iterator[None]:
        with outer(name) if outer else contextlib.nullcontext(), watch(name):
            yield

    with _set(WATCH, both):
        yield


TRAFFIC: Counter[tuple[Stage, Literal["to_device", "to_host", "on_host", "on_device"]]] = Counter()
"""Bytes that went between host and device in each stage, or between the processor of either and its memory."""


def note_traffic(direction: Literal["to_device", "to_host"], size: int) -> None:
    """Adds ``size`` bytes to the present stage's."""
    TRAFFIC[STAGE.get(), direction] += size


def note_host_work(size: int) -> None:
    """Adds ``size`` bytes, read and written by work on tensors in host memory, to the present stage's."""
    TRAFFIC[STAGE.get(), "on_host"] += size


def note_device_work(size: int) -> None:
    """Adds ``size`` bytes, read and written by work on tensors in the device's memory, to the present stage's."""
    TRAFFIC[STAGE.get(), "on_device"] += size
