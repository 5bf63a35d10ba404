"""Finds and loads the native CPU library, and turns its C interface into functions over tensors."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ABI = 7
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_FILE_NAME = {"darwin": "libleap_native.dylib", "win32": "leap_native.dll"}.get(sys.platform, "libleap_native.so")
_POINTER, _FLOAT, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_float, ctypes.c_int32, ctypes.c_int64
_SIZES_AND_DTYPES = [_INT64, _INT64, _INT32, _INT32]
# As in native/leap_native.h, without the number of threads, which is the last argument of each.
_SIGNATURES = {
    "leap_connector": [*[_POINTER] * 6, *_SIZES_AND_DTYPES],
    "leap_scale": [*[_POINTER] * 5, *_SIZES_AND_DTYPES],
    "leap_distances": [*[_POINTER] * 9, *_SIZES_AND_DTYPES],
    "leap_combine": [*[_POINTER] * 3, _FLOAT, _FLOAT, *[_POINTER] * 3, *_SIZES_AND_DTYPES],
    "leap_euler_step": [*[_POINTER] * 6, *_SIZES_AND_DTYPES],
    "leap_weighted_loss": [_POINTER, _POINTER, _FLOAT, _FLOAT, _POINTER, _POINTER, _INT64, _INT64],
    "leap_stochastic_round": [_POINTER, _POINTER, ctypes.c_uint64, _INT64, _INT64],
    "leap_accumulate": [_POINTER, _POINTER, _INT64, _INT32, _INT32],
    "leap_ema_update": [_POINTER, _POINTER, _FLOAT, _INT64, _INT32, _INT32],
    "leap_adamw_8bit_step": [*[_POINTER] * 10, *[_FLOAT] * 9, ctypes.c_uint64, _INT64, _INT64, _INT32, _INT32],
    "leap_norm_rope": [*[_POINTER] * 5, *[_INT64] * 10, _FLOAT, _INT32, _INT32],
    "leap_norm_rope_backward": [*[_POINTER] * 7, *[_INT64] * 11, _FLOAT, _INT32, _INT32],
    "leap_group_norm_silu": [*[_POINTER] * 6, *[_INT64] * 4, _FLOAT, _INT32],
    "leap_group_norm_silu_backward": [*[_POINTER] * 9, *[_INT64] * 4, _INT32],
}
_VECTOR = [_POINTER, _INT64]
_ROWS = [_INT64, _INT64, _INT64]
_SIGNATURES |= {
    "leap_adaln": [_POINTER, *_VECTOR, *_VECTOR, _FLOAT, *[_POINTER] * 2, *_ROWS, *[_INT32] * 3],
    "leap_adaln_backward": [*[_POINTER] * 2, *_VECTOR, *[_POINTER] * 4, *_ROWS, *[_INT32] * 3],
    "leap_gated_residual": [_POINTER, *_VECTOR, *[_POINTER] * 2, *_ROWS, *[_INT32] * 3],
    "leap_gated_residual_backward": [_POINTER, *_VECTOR, *[_POINTER] * 3, *_ROWS, *[_INT32] * 3],
    "leap_gelu_tanh": [*[_POINTER] * 3, _INT64, _INT32],
    "leap_swiglu": [*_VECTOR, *_VECTOR, _POINTER, _INT64, _INT64, _INT32],
    "leap_swiglu_backward": [_POINTER, *_VECTOR, *_VECTOR, *[_POINTER] * 2, *_ROWS, _INT32],
}
_NUMBERS = frozenset((int, float, bool, type(None)))
_ERRORS = {-1: "unknown dtype", -2: "out of memory"}


def unavailable() -> str | None:
    """Say why the native library cannot be used, or return None if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def describe() -> str:
    """Describe the loaded library: its instruction set and how many threads it would use."""
    library = _library()
    threads = torch.get_num_threads() if library.leap_has_openmp() else 1
    return f"native library, {library.leap_isa().decode()}, {threads} thread{'s' if threads > 1 else ''}"


def call(function: str, *arguments: Tensor | torch.dtype | float | None) -> None:
    """Call a function of the library; tensors must be contiguous and on the CPU.

    The library uses as many threads as PyTorch does, so `torch.set_num_threads` holds for both.

    Raises:
        RuntimeError: if the function reports an error.
    """
    # To ask a number whether it is a tensor takes longer than to ask whether it is a number.
    plain = [
        a if type(a) in _NUMBERS else DTYPES[a] if isinstance(a, torch.dtype) else a.data_ptr()  # type: ignore[union-attr]
        for a in arguments
    ]
    status = _function(function)(*plain, torch.get_num_threads())
    if status != 0:
        raise RuntimeError(f"{function} failed: {_ERRORS.get(status, status)}.")


@functools.cache
def _function(name: str) -> Callable[..., int]:
    function: Callable[..., int] = getattr(_library(), name)
    return function


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Load the library once; return the reason as a string where that fails."""
    # An editable install keeps built files beside the installed package, not beside the sources.
    package = sys.modules[__package__]
    candidates = [Path(folder) / "_lib" / _FILE_NAME for folder in package.__path__]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return "the native library was not built (installing the package builds it, given a C++ compiler)"
    try:
        library = ctypes.CDLL(str(path))
        abi = library.leap_abi()
        if abi != ABI:
            return f"the native library has interface {abi} and this package needs {ABI}: reinstall"
        for name, argument_types in _SIGNATURES.items():
            getattr(library, name).argtypes = [*argument_types, _INT32]
        library.leap_isa.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"the native library cannot be loaded ({error})"
    return library
