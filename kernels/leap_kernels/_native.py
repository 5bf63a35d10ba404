"""Finds and loads the native CPU library, a module of Python whose functions take tensors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 8

_FILE_NAME = "leap_native.pyd" if sys.platform == "win32" else "leap_native.abi3.so"


def unavailable() -> str | None:
    """Say why the native library cannot be used, or return None if it can."""
    return _load()[1]


def library() -> Any:
    """Return the library, or None without it."""
    return _load()[0]


def describe() -> str:
    """Describe the loaded library: its instruction set and how many threads it would use."""
    loaded = _library()
    threads = torch.get_num_threads() if loaded.has_openmp() else 1
    return f"native library, {loaded.isa()}, {threads} thread{'s' if threads > 1 else ''}"


def call(function: str, *arguments: Tensor | torch.dtype | float | None) -> None:
    """Call a function of the library; tensors must be contiguous and on the CPU.

    The arguments are those of native/leap_native.h without the number of threads: the library uses as many as PyTorch
    does, so `torch.set_num_threads` holds for both.

    Raises:
        RuntimeError: if the function reports an error.
    """
    _function(function)(*arguments)


@functools.cache
def _function(name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(_library(), name)
    return function


def _library() -> Any:
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Load the library once; return it, or None and the reason where that fails."""
    # An editable install keeps built files beside the installed package, not beside the sources.
    package = sys.modules[__package__]
    candidates = [Path(folder) / "_lib" / _FILE_NAME for folder in package.__path__]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return None, (
            "the native library was not built (installing the package builds it, given a C++ compiler and Python's "
            "headers)"
        )
    try:
        loader = ExtensionFileLoader("leap_native", str(path))
        loaded: Any = module_from_spec(ModuleSpec("leap_native", loader, origin=str(path)))
        loader.exec_module(loaded)
        abi = loaded.abi()
        if abi != ABI:
            return None, f"the native library has interface {abi} and this package needs {ABI}: reinstall"
    except (ImportError, AttributeError) as error:
        return None, f"the native library cannot be loaded ({error})"
    return loaded, None
