"""What the step of one parameter and that of many share: numbers, kernel code and checks."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import check_writable
from ._moments import Adam8bitState, layout, narrowed_group, widened_group
from ._triton import fma, jit, tl
from .stochastic_round import draw_each, draw_eights, round_off

GROUPS, WARPS = 8, 4
"""Of 256 elements, so many to a program; and its warps."""


class Factors(NamedTuple):
    """What a step multiplies by, each a number of float32."""

    beta1: float
    rest1: float  # 1 - beta1
    beta2: float
    rest2: float  # 1 - beta2
    gradient_scale: float
    rate: float  # lr / (1 - beta1^step)
    root: float  # sqrt(1 - beta2^step)
    eps: float
    decay: float  # lr * weight_decay


def factors_of(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, gradient_scale: float
) -> Factors:
    """Return the factors of a step, each computed in double precision and then rounded."""
    rate, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    factors = (beta1, 1 - beta1, beta2, 1 - beta2, gradient_scale, rate, root, eps, lr * weight_decay)
    return Factors(*(ctypes.c_float(factor).value for factor in factors))


@jit
def step_block(  # type: ignore[no-untyped-def]
    program,
    parameter_ptr,
    gradient_ptr,
    state1_ptr,
    absmax1_ptr,
    state2_ptr,
    absmax2_ptr,
    beta1,
    rest1,
    beta2,
    rest2,
    gradient_scale,
    rate,
    root,
    eps,
    decay,
    seed,
    offset,
    count,
    WHOLE_COUNTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Take the step of the GROUPS * GROUP elements that are those of a program."""
    BLOCK: tl.constexpr = GROUPS * GROUP
    at = program * BLOCK + tl.arange(0, BLOCK)
    group = program * GROUPS + tl.arange(0, GROUPS)
    inside, with_elements = at < count, group * GROUP < count
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32) * gradient_scale
    # Beyond the end both moments are 0, and so no largest magnitude.
    state1 = tl.load(state1_ptr + at, mask=inside, other=127)
    state2 = tl.load(state2_ptr + at, mask=inside, other=0)
    absmax1 = tl.load(absmax1_ptr + group, mask=with_elements, other=0.0)
    absmax2 = tl.load(absmax2_ptr + group, mask=with_elements, other=0.0)
    old = tl.load(parameter_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = fma(g, rest1, widened_group(state1, absmax1, True, GROUPS, GROUP) * beta1)
    v = fma(g * rest2, g, widened_group(state2, absmax2, False, GROUPS, GROUP) * beta2)
    change = tl.div_rn(m * rate, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    stepped = old - (change + old * decay)
    # Random bits take registers, which run short before the moments are stored.
    ROUNDS: tl.constexpr = parameter_ptr.dtype.element_ty == tl.bfloat16
    if not ROUNDS:
        tl.store(parameter_ptr + at, stepped, mask=inside)
    state1, absmax1 = narrowed_group(m, True, GROUPS, GROUP)
    tl.store(state1_ptr + at, state1, mask=inside)
    tl.store(absmax1_ptr + group, absmax1, mask=with_elements)
    state2, absmax2 = narrowed_group(v, False, GROUPS, GROUP)
    tl.store(state2_ptr + at, state2, mask=inside)
    tl.store(absmax2_ptr + group, absmax2, mask=with_elements)
    if ROUNDS:
        if WHOLE_COUNTERS:
            random = draw_eights(seed, (offset >> 3) + program * (BLOCK // 8) + tl.arange(0, BLOCK // 8))
        else:
            random = draw_each(seed, offset + at)
        tl.store(parameter_ptr + at, round_off(stepped, random), mask=inside)


def check_tensors(op: str, parameter: Tensor, gradient: Tensor, state: Adam8bitState) -> None:
    """Check that a step of `op` can take the tensors.

    Raises:
        ValueError: as `adamw_8bit_step_` does.
    """
    for name, tensor in (("parameter", parameter), ("gradient", gradient)):
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{op} takes float32 and bfloat16, but {name} is {tensor.dtype}.")
    check_writable(op, "parameter", parameter, "gradient", gradient)
    for tensor, (dtype, shape) in zip(state.tensors(), layout(parameter), strict=True):
        if (tensor.dtype, tuple(tensor.shape), tensor.device) != (dtype, shape, parameter.device):
            raise ValueError(
                f"{op} needs a state of {dtype} {shape} on {parameter.device}, not {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}: start with Adam8bitState.zeros_like(parameter)."
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{op} needs a contiguous state, whose groups of 256 elements are in order.")


def check_numbers(op: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> None:
    """Check the numbers of a step of `op`.

    Raises:
        ValueError: if one is out of range.
    """
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{op} needs {name} of at least 0, not {value}.")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{op} needs {name} in [0, 1), not {value}.")
    if step < 1:
        raise ValueError(f"{op} counts steps from 1, not {step}.")
