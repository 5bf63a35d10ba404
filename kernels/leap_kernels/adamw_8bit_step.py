"""One step of AdamW in place, with both moments kept as bytes, for weights that rounding to nearest would not move.

    g = gradient_scale * gradient
    m = beta1 * m + (1 - beta1) * g,    v = beta2 * v + (1 - beta2) * g^2
    change = lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps) + lr * weight_decay * parameter
    parameter = parameter - change      any shape; float32, or bfloat16 rounded as `stochastic_round_` does

A moment is stored as bitsandbytes stores it (`_moments.py` says how). Bytes and absmax come out as from bitsandbytes
0.50.2 on a CPU, on every backend. The weights do not: bitsandbytes rounds bfloat16 to nearest, and its factor
1 - lr * weight_decay, in float32, loses a decay below 3e-8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._adamw_8bit import GROUPS, WARPS, Factors, check_numbers, check_tensors, factors_of, step_block
from ._arguments import check_draws, put_back
from ._dispatch import choose, register, unsupported
from ._library import define_in_place
from ._moments import (
    GROUP,
    MAP1,
    MAP2,
    TABLE1,
    TABLE2,
    Adam8bitState,
    multiply_add,
    narrow,
    widened,
)
from ._triton import jit_for_any, tl, triton
from .stochastic_round import PER_COUNTER
from .stochastic_round import reference as round_reference

# ---- reference ---------------------------------------------------------------------------------------------


def reference(
    parameter: Tensor, gradient: Tensor, state: Adam8bitState, factors: Factors, seed: int, offset: int
) -> None:
    """Take the step on contiguous tensors in plain PyTorch."""
    g = gradient.flatten().float() * factors.gradient_scale
    m = multiply_add(g, factors.rest1, widened(state.state1, state.absmax1, MAP1) * factors.beta1)
    v = multiply_add(g * factors.rest2, g, widened(state.state2, state.absmax2, MAP2) * factors.beta2)
    old = parameter.flatten().float()
    # Rounded from float64: PyTorch's own float32 root may be off by its last bit.
    change = m * factors.rate / (v.double().sqrt().float() / factors.root + factors.eps)
    stepped = (old - (change + old * factors.decay)).view(parameter.shape)
    if parameter.dtype == torch.bfloat16:
        round_reference(parameter, stepped, seed, offset)
    else:
        parameter.copy_(stepped)
    narrow(m, state.state1, state.absmax1, TABLE1)
    narrow(v, state.state2, state.absmax2, TABLE2)


# ---- Triton ------------------------------------------------------------------------------------------------


@jit_for_any("seed", "offset")
def adamw_kernel(  # type: ignore[no-untyped-def]
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
    seed: tl.uint64,
    offset: tl.int64,
    count,
    WHOLE_COUNTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    # 64 bits from here on: a tensor may exceed 2^31 elements.
    program = tl.program_id(0).to(tl.int64)
    # fmt: off
    step_block(
        program, parameter_ptr, gradient_ptr, state1_ptr, absmax1_ptr, state2_ptr, absmax2_ptr,
        beta1, rest1, beta2, rest2, gradient_scale, rate, root, eps, decay,
        seed, offset, count, WHOLE_COUNTERS, GROUPS, GROUP,
    )
    # fmt: on


def triton_step(
    parameter: Tensor, gradient: Tensor, state: Adam8bitState, factors: Factors, seed: int, offset: int
) -> None:
    """Take the step on contiguous tensors with Triton; arguments as for `reference`, and the same bits."""
    numbers = (*factors, seed, offset, parameter.numel())
    constants = (offset % PER_COUNTER == 0, GROUPS, GROUP)
    with torch.cuda.device_of(parameter):
        adamw_kernel[(triton.cdiv(parameter.numel(), GROUPS * GROUP),)](
            *(parameter, gradient, *state.tensors(), *numbers, *constants),
            num_warps=WARPS,
            # A product that the reference rounds is rounded here.
            enable_fp_fusion=False,
        )


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_step(
    parameter: Tensor, gradient: Tensor, state: Adam8bitState, factors: Factors, seed: int, offset: int
) -> None:
    """Take the step on contiguous tensors with native/adamw.cpp; arguments as for `reference`."""
    tensors = (parameter, gradient, *state.tensors(), MAP1, TABLE1, MAP2, TABLE2)
    numbers = (*factors, seed, offset, parameter.numel())
    _native.call("leap_adamw_8bit_step", *tensors, *numbers, parameter.dtype, gradient.dtype)


# ---- dispatch ----------------------------------------------------------------------------------------------


_OP = register("adamw_8bit_step_", unsupported)
_STEP = {"triton": triton_step, "native": native_step, "reference": reference}


def _run(
    parameter: Tensor,
    state1: Tensor,
    absmax1: Tensor,
    state2: Tensor,
    absmax2: Tensor,
    gradient: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    gradient_scale: float,
    seed: int,
    offset: int,
) -> None:
    if parameter.numel() == 0:
        return
    factors = factors_of(lr, beta1, beta2, eps, weight_decay, step, gradient_scale)
    state = Adam8bitState(state1, absmax1, state2, absmax2)
    whole = parameter.contiguous()
    take = _STEP[choose(_OP, parameter, gradient, *state.tensors())]
    # The schema's integers are signed: the upper half of the seeds came as negative numbers.
    take(whole, gradient.contiguous(), state, factors, seed % (1 << 64), offset)
    put_back(whole, parameter)


_step = define_in_place(
    "adamw_8bit_step_(Tensor(a!) parameter, Tensor(b!) state1, Tensor(c!) absmax1, Tensor(d!) state2, "
    "Tensor(e!) absmax2, Tensor gradient, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "SymInt step, float gradient_scale, SymInt seed, SymInt offset) -> ()",
    _run,
    written=5,
)


@torch.no_grad()
def adamw_8bit_step_(
    parameter: Tensor,
    gradient: Tensor,
    state: Adam8bitState,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    gradient_scale: float = 1.0,
    seed: int,
    offset: int,
) -> Tensor:
    """Take one step of AdamW on `parameter` and its `state`, in place, and return `parameter`.

    Weight, decay and update are combined in float32. A float32 parameter takes the result as it is, a bfloat16 one
    rounds it stochastically, once, with the bits that `stochastic_round_` draws for `seed` and `offset`: on average it
    moves as a float32 one would. Draw from new positions at every step.

    A NaN or infinity in the gradient makes its own weight NaN. In the state it stays within the 256 elements that share
    an `absmax`: NaN is stored as the lowest byte (of the first moment -0.99 absmax, of the second 0), as bitsandbytes
    does, but an infinite `absmax` makes all 256 weights NaN at the next step. Look at the norm first.

    Args:
        parameter: any shape, float32 or bfloat16; any strides under which no two elements share memory.
        gradient: shape and device of `parameter`, float32 or bfloat16, any strides.
        state: `Adam8bitState.zeros_like(parameter)`, or the state after the step before, also one of bitsandbytes.
        lr: learning rate, at least 0.
        beta1: 0 <= beta1 < 1; how much of the first moment stays.
        beta2: 0 <= beta2 < 1; how much of the second moment stays.
        eps: at least 0; added to the root of the second moment, after its bias correction.
        weight_decay: at least 0; decoupled: a step takes lr * weight_decay of the parameter.
        step: number of this step, from 1 on.
        gradient_scale: multiplies the gradient in float32: the coefficient that clips a global norm.
        seed: 0 <= seed < 2^64; for bfloat16.
        offset: position of the first element's bits; 0 <= offset, and offset + elements <= 2^63. For bfloat16.

    Returns:
        `parameter`.

    Raises:
        ValueError: on a wrong dtype, shape or device, overlapping `parameter`, a state that is not contiguous, or a
            number out of range.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    check_tensors("adamw_8bit_step_", parameter, gradient, state)
    check_numbers("adamw_8bit_step_", lr, beta1, beta2, eps, weight_decay, step)
    check_draws("adamw_8bit_step_", seed, offset, parameter.numel())
    numbers = (lr, beta1, beta2, eps, weight_decay, step, gradient_scale)
    _step(parameter, *state.tensors(), gradient, *numbers, seed if seed < 1 << 63 else seed - (1 << 64), offset)
    return parameter
