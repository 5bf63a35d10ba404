"""One step of an exponential moving average of weights, in place.

    average = average + (1 - decay) * (weights - average)        any shape

which is decay * average + (1 - decay) * weights, written so that an average that has arrived stays where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._arguments import FLOATS, check_writable, compute_dtype, put_back
from ._dispatch import choose, register, unsupported
from ._library import define_in_place
from ._triton import jit_for_any, tl, triton

# ---- reference ---------------------------------------------------------------------------------------------


def reference(average: Tensor, weights: Tensor, step: float) -> None:
    """Move `average` towards `weights` by `step = 1 - decay` in plain PyTorch."""
    dtype = compute_dtype(average, weights)
    old = average.to(dtype)
    average.copy_(old + step * (weights.to(dtype) - old))


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit_for_any("step")
def ema_kernel(average_ptr, weights_ptr, step, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # 64 bits: a tensor may exceed 2^31 elements.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    old = tl.load(average_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0).to(tl.float32)
    new = old + step * (weights - old)
    tl.store(average_ptr + at, new.to(average_ptr.dtype.element_ty), mask=inside)


def triton_update(average: Tensor, weights: Tensor, step: float) -> None:
    """Update contiguous tensors with Triton; arguments as for `reference`."""
    count = average.numel()
    with torch.cuda.device_of(average):
        ema_kernel[(triton.cdiv(count, BLOCK),)](average, weights, step, count, BLOCK)


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_update(average: Tensor, weights: Tensor, step: float) -> None:
    """Update contiguous tensors with native/weights.cpp; arguments as for `reference`."""
    _native.call("leap_ema_update", average, weights, step, average.numel(), average.dtype, weights.dtype)


# ---- dispatch ----------------------------------------------------------------------------------------------

_OP = register("ema_update_", unsupported)
_UPDATE = {"triton": triton_update, "native": native_update, "reference": reference}


def _run(average: Tensor, weights: Tensor, decay: float) -> None:
    if average.numel() == 0:
        return
    whole = average.contiguous()
    _UPDATE[choose(_OP, average, weights)](whole, weights.contiguous(), 1 - decay)
    put_back(whole, average)


def _check(average: Tensor, weights: Tensor, decay: float) -> None:
    if average.dtype not in FLOATS or weights.dtype not in FLOATS:
        raise ValueError(
            f"ema_update_ takes float32, bfloat16, float16 and float64, not {weights.dtype} into {average.dtype}."
        )
    check_writable("ema_update_", "average", average, "weights", weights)


_update = define_in_place(
    "ema_update_(Tensor(a!) average, Tensor weights, float decay) -> ()",
    _run,
    unit="element",
    check=_check,
    at_once="ema_update",
)


def ema_update_(average: Tensor, weights: Tensor, decay: float) -> Tensor:
    """Set `average` to `average + (1 - decay) * (weights - average)`, and return it.

    Arithmetic is float32 (float64 if a tensor is float64), rounded once to the dtype of `average`. In a bfloat16
    average a change below half a step of bfloat16 is lost: with decay 0.995, whatever is nearer than a hundred
    steps stays away. Keep the average in float32 where that matters.

    Args:
        average: any shape, float32, bfloat16, float16 or float64; any strides under which no two elements share
            memory.
        weights: shape and device of `average`, any of these dtypes, any strides.
        decay: 0 <= decay <= 1; how much of the average stays.

    Returns:
        `average`.

    Raises:
        ValueError: on a wrong dtype, shape, device or decay, or overlapping `average`.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"ema_update_ needs a decay in [0, 1], not {decay}.")
    _update(average, weights, decay)
    return average
