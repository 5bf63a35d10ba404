"""Where tensors live. Code says what it makes is for, and the ledger, which cannot see it on a CPU, believes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Role = Literal["weights", "gradients", "optimizer", "average", "activations", "reward", "latents"]

HOST: ContextVar[bool] = ContextVar("leapalign_host", default=False)
ROLE: ContextVar[Role] = ContextVar("leapalign_role", default="activations")


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
def _set(variable: ContextVar, value: object) -> Iterator[None]:  # type: ignore[type-arg]
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@dataclass
class Traffic:
    """Bytes that went between host and device."""

    to_device: int = 0
    to_host: int = 0


TRAFFIC = Traffic()
