"""The one place that knows where Triton comes from, and whether it runs on a GPU or in its interpreter."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from collections.abc import Callable
from typing import Any

import torch

triton: Any = None
tl: Any = None
MISSING: str | None = None
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError as error:
    MISSING = f"Triton cannot be imported ({error})"

# Triton reads the variable when a kernel is decorated, that is, when leap_kernels is imported.
INTERPRETER = MISSING is None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(kernel: Callable[..., None]) -> Any:
    """Return `triton.jit(kernel)`, or the function itself where Triton is missing and none can launch it."""
    return kernel if MISSING else triton.jit(kernel)


def jit_for_any(*names: str) -> Callable[[Callable[..., None]], Any]:
    """Decorate as `jit`, but compile no version of its own for values of the named arguments that divide by 16."""
    return lambda kernel: kernel if MISSING else triton.jit(kernel, do_not_specialize=names)


@jit
def _fma_in_parts(x, y, z):  # type: ignore[no-untyped-def]
    """Return x * y + z of float32, rounded once, by way of float64."""
    y, z = tl.cast(y, tl.float32).to(tl.float64), tl.cast(z, tl.float32).to(tl.float64)
    product = x.to(tl.float64) * y  # exact
    total = product + z
    # What float64 has lost (Knuth's sum) must leave its trace in the last bit, or float32 could see a tie.
    of_z = total - product
    lost = (product - (total - of_z)) + (z - of_z)
    bits = total.to(tl.int64, bitcast=True)
    traceless = (lost != 0.0) & (bits & 1 == 0) & (tl.abs(total) < float("inf"))
    nearer = tl.where((lost > 0.0) == (total > 0.0), bits + 1, bits - 1)
    return tl.where(traceless, nearer, bits).to(tl.float64, bitcast=True).to(tl.float32)


# Triton's interpreter rounds the product of `tl.fma`, too, and no GPU does.
fma: Any = _fma_in_parts if INTERPRETER else None if MISSING else tl.fma


@jit
def block_of_sample(per_sample, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's sample, and the addresses and mask of its block: one program per block of one sample."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    # 64 bits from here on: a batch may exceed 2^31 elements.
    within = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return sample, sample * per_sample + within, within < per_sample


def unavailable(device: torch.device) -> str | None:
    """Say why Triton cannot run on `device`, or return None if it can."""
    if MISSING:
        return MISSING
    if device.type != "cuda" and not INTERPRETER:
        return f"Triton needs a GPU and the tensors are on {device.type} (TRITON_INTERPRET=1 would interpret)"
    return _UNFIT


def unfit(triton_version: str, numpy_version: str) -> str | None:
    """Say why an interpreter cannot run kernels whose loops end where an argument says, or return None if it can.

    It has NumPy make such an end an integer of an array of one number, which NumPy does no more.
    """
    if _release(triton_version) < (3, 7) and _release(numpy_version) >= (2, 4):
        return f"the interpreter of Triton {triton_version} needs NumPy below 2.4, not {numpy_version}, or Triton 3.7"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


_UNFIT = unfit(triton.__version__, importlib.metadata.version("numpy")) if INTERPRETER else None


def describe() -> str:
    """Describe the Triton in use, for `explain`."""
    return f"Triton {triton.__version__}" + (", in its interpreter" if INTERPRETER else "")
