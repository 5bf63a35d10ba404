"""Decides, at call time, which backend runs an op: Triton, native CPU code or the PyTorch reference.

The environment variable `LEAP_KERNELS=auto|triton|native|reference`, read once, sets the wish; `use_backend`
overrides it for a block of code. `auto` means Triton for tensors on a GPU and native code for tensors on the CPU. Where
a backend cannot take the tensors, the reference does, and the reason is logged once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import _native, _triton

Backend = Literal["triton", "native", "reference"]
SETTINGS = ("auto", "triton", "native", "reference")

_log = logging.getLogger("leap_kernels")
_logged: set[str] = set()


class BackendUnavailable(RuntimeError):
    """Raised in strict mode instead of falling back to the reference."""


@dataclass(frozen=True)
class Op:
    """An op and its predicate: why a backend cannot take these tensors, or None if it can."""

    name: str
    eligible: Callable[..., str | None]


@dataclass(frozen=True)
class Explanation:
    """Which backend `op` would use here for tensors on `device`, and why, in words; "none" without the device."""

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Setting:
    """A wish for a backend; `strict` forbids falling back."""

    name: str
    strict: bool = False


_BY_NAME = {name: Setting(name) for name in SETTINGS}
_PLAIN = (Tensor, torch.nn.Parameter)
_NATIVE = ("auto", "native")
_AUTOMATIC: dict[str, Backend] = {"cuda": "triton", "cpu": "native"}

_override: ContextVar[Setting | None] = ContextVar("leap_kernels_backend", default=None)
_ops: dict[str, Op] = {}


def register(name: str, eligible: Callable[..., str | None]) -> Op:
    """Register an op, so that `explain` lists it. `eligible(backend, *tensors)` gives a reason or None."""
    return _ops.setdefault(name, Op(name, eligible))


def unsupported(backend: str, *tensors: Tensor) -> str | None:
    """Reasons that hold for every kernel of `backend`: a predicate, or the part of it that ops share.

    Kernels compute in float32 and read memory: float64 is the reference's, and so are tensor subclasses, whose
    memory may mean something else.
    """
    if backend == "reference":
        return None
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return "an argument is a tensor subclass"
        if tensor.dtype is torch.float64:
            return "float64 is computed by the reference"
    if backend == "triton":
        return _triton.unavailable(tensors[0].device)
    if not tensors[0].is_cpu:
        return f"native kernels need CPU tensors and these are on {tensors[0].device.type}"
    return _native.unavailable()


@contextlib.contextmanager
def use_backend(name: str, strict: bool = False) -> Iterator[None]:
    """Use backend `name` ("auto", "triton", "native" or "reference") inside a `with` block.

    An op that the backend cannot run falls back to the reference; with `strict`, it raises
    `BackendUnavailable` with the reason instead. The setting holds for the current thread or task.

    Raises:
        ValueError: if `name` is none of the four.
    """
    token = _override.set(Setting(_checked(name, "backend"), strict))
    try:
        yield
    finally:
        _override.reset(token)


def current() -> Setting | None:
    """Return what `use_backend` set for this block, for `resumed`. None without it and while compiling."""
    return None if torch.compiler.is_compiling() else _override.get()


def resumed(setting: Setting | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function under a setting of earlier: a backward pass may run in a thread that never saw the block."""
    if setting is None:
        return function(*arguments)
    token = _override.set(setting)
    try:
        return function(*arguments)
    finally:
        _override.reset(token)


def choose(op: Op, *tensors: Tensor) -> Backend:
    """Return the backend that runs `op` on `tensors` under the current setting.

    Ops ask when they run, so a graph of `torch.compile` obeys the setting of the moment, too.

    Raises:
        BackendUnavailable: in strict mode, if the wanted backend cannot run the op.
        ValueError: if the environment variable LEAP_KERNELS names no backend.
    """
    setting = _override.get() or _of_the_process()
    # Most calls are on the CPU by default: what a device is called takes longer to find out.
    wanted: Backend = "native" if tensors[0].is_cpu and setting.name == "auto" else _wanted(setting, tensors[0].device)
    reason = op.eligible(wanted, *tensors)
    if reason is None:
        return wanted
    message = f"{op.name} cannot use the {wanted} backend: {reason}."
    if setting.strict:
        raise BackendUnavailable(message)
    # A fallback that somebody asked not to have deserves a warning; the automatic choice only a note.
    _log_once(logging.INFO if setting.name == "auto" else logging.WARNING, message)
    return "reference"


def native_library() -> Any:
    """Return the native library where it takes tensors on the CPU under the current setting, unless an op has a reason.

    None where it does not.
    """
    if (_override.get() or _of_the_process()).name in _NATIVE:
        return _native.library()
    return None


def explain() -> list[Explanation]:
    """Say for every op which backend it would use on this machine under the current setting, and why.

    The question is put for float32 tensors, on the CPU and on a GPU: some work is done on the host wherever a model is.
    """
    return [*_explanations("cpu"), *_explanations("cuda")]


def _explanations(device: str) -> list[Explanation]:
    if device == "cuda" and not torch.cuda.is_available():
        return [Explanation(op.name, device, "none", "PyTorch finds no GPU here") for op in _ops.values()]
    probe = torch.zeros(1, 1, device=device)
    wanted = _wanted(_setting(), probe.device)
    return [_explanation(op, device, wanted, probe) for op in _ops.values()]


def _explanation(op: Op, device: str, wanted: Backend, probe: Tensor) -> Explanation:
    reason = op.eligible(wanted, probe)
    if reason is not None:
        return Explanation(op.name, device, "reference", reason)
    described = {"triton": _triton.describe, "native": _native.describe, "reference": _describe_reference}
    return Explanation(op.name, device, wanted, described[wanted]())


def _describe_reference() -> str:
    return f"PyTorch {torch.__version__}"


def _setting() -> Setting:
    return _override.get() or _of_the_process()


@functools.cache
def _of_the_process() -> Setting:
    # Once: asking takes as long as a small kernel.
    return _BY_NAME[_checked(os.environ.get("LEAP_KERNELS", "auto"), "value of LEAP_KERNELS")]


def _wanted(setting: Setting, device: torch.device) -> Backend:
    if setting.name == "auto":
        return _AUTOMATIC.get(device.type, "reference")
    return setting.name  # type: ignore[return-value]


def _checked(name: str, what: str) -> str:
    if name not in SETTINGS:
        raise ValueError(f"Unknown {what} {name!r}: choose one of {', '.join(SETTINGS)}.")
    return name


def _log_once(level: int, message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _log.log(level, message)
