"""The sum of a tensor with another of a narrower dtype, in place: gradients that add up.

    total = total + value        any shape

in one pass. PyTorch's `add_` of two dtypes first makes a copy of the value in the dtype of the total.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._arguments import FLOATS, check_apart, check_writable, compute_dtype, put_back
from ._dispatch import choose, register, unsupported
from ._library import define_in_place
from ._triton import jit, tl, triton

# ---- reference ---------------------------------------------------------------------------------------------


def reference(total: Tensor, value: Tensor) -> None:
    """Add `value` to `total` in plain PyTorch."""
    dtype = compute_dtype(total, value)
    total.copy_(total.to(dtype) + value.to(dtype))


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def accumulate_kernel(total_ptr, value_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # 64 bits: a tensor may exceed 2^31 elements.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    old = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_ptr + at, (old + value).to(total_ptr.dtype.element_ty), mask=inside)


def triton_add(total: Tensor, value: Tensor) -> None:
    """Add contiguous tensors with Triton; arguments as for `reference`."""
    count = total.numel()
    with torch.cuda.device_of(total):
        accumulate_kernel[(triton.cdiv(count, BLOCK),)](total, value, count, BLOCK)


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_add(total: Tensor, value: Tensor) -> None:
    """Add contiguous tensors with native/weights.cpp; arguments as for `reference`."""
    _native.call("leap_accumulate", total, value, total.numel(), total.dtype, value.dtype)


# ---- dispatch ----------------------------------------------------------------------------------------------

_OP = register("accumulate_", unsupported)
_ADD = {"triton": triton_add, "native": native_add, "reference": reference}


def _run(total: Tensor, value: Tensor) -> None:
    if total.numel() == 0:
        return
    whole = total.contiguous()
    _ADD[choose(_OP, total, value)](whole, value.contiguous())
    put_back(whole, total)


def _check(total: Tensor, value: Tensor) -> None:
    if total.dtype not in FLOATS or value.dtype not in FLOATS:
        raise ValueError(
            f"accumulate_ takes float32, bfloat16, float16 and float64, not {value.dtype} into {total.dtype}."
        )
    check_writable("accumulate_", "total", total, "value", value)
    check_apart("accumulate_", "total", total, "value", value)


_add = define_in_place(
    "accumulate_(Tensor(a!) total, Tensor value) -> ()", _run, unit="element", check=_check, at_once="accumulate"
)


def accumulate_(total: Tensor, value: Tensor) -> Tensor:
    """Set `total` to `total + value`, and return it.

    Arithmetic is float32 (float64 if a tensor is float64), rounded once to the dtype of `total`: into float32, the
    bits of `total.add_(value)`. Keep a sum of many gradients in float32: in bfloat16, what is below half a step of the
    sum is lost.

    Args:
        total: any shape, float32, bfloat16, float16 or float64; any strides under which no two elements share
            memory.
        value: shape and device of `total`, any of these dtypes, any strides; shares no memory with `total`.

    Returns:
        `total`.

    Raises:
        ValueError: on a wrong dtype, shape or device, overlapping memory, or a `total` that requires a gradient.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    if total.requires_grad and torch.is_grad_enabled():
        raise ValueError("accumulate_ has no gradient: give it total.detach(), or call it under torch.no_grad().")
    _add(total, value)
    return total
