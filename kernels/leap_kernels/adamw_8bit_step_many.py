"""`adamw_8bit_step_` of many parameters at once, to the same bits: on a GPU one launch where it would take one each.

The parameters of a launch have their dtype in common, and so have their gradients. Random bits at a multiple of 8 are
drawn for eight weights at once, and aligned tensors are accessed in full width: those that differ get launches of
their own, so that there are at most a handful.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._adamw_8bit import GROUPS, WARPS, Factors, check_numbers, check_tensors, factors_of, step_block
from ._arguments import check_draws, put_back
from ._dispatch import choose, register, unsupported
from ._library import define_in_place
from ._many import ADDRESSES, Table, address, aligned, grouped, own_row, table
from ._moments import GROUP, Adam8bitState
from ._triton import jit, tl
from .adamw_8bit_step import native_step
from .adamw_8bit_step import reference as step_reference
from .stochastic_round import PER_COUNTER

# ---- reference ---------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """The step of one parameter, of contiguous tensors."""

    parameter: Tensor
    gradient: Tensor
    state: Adam8bitState
    factors: Factors
    seed: int
    offset: int


def reference(jobs: Sequence[Job]) -> None:
    """Take one step after the other."""
    for job in jobs:
        step_reference(*job)


# ---- Triton ------------------------------------------------------------------------------------------------

# Beside those of every table: six addresses, offset and seed, and the factors, two a word.
NUMBERS = ADDRESSES + 6
WORDS = NUMBERS + 2 + (len(Factors._fields) + 1) // 2


@jit
def adamw_many_kernel(  # type: ignore[no-untyped-def]
    # The first parameter and the first gradient say the dtypes of all.
    parameter_ptr,
    gradient_ptr,
    rows_ptr,
    row_of_ptr,
    WHOLE_COUNTERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ADDRESSES: tl.constexpr,
    WORDS: tl.constexpr,
):
    BYTES: tl.constexpr = tl.pointer_type(tl.uint8)
    SINGLES: tl.constexpr = tl.pointer_type(tl.float32)
    NUMBERS: tl.constexpr = ADDRESSES + 6
    row_ptr, program, count = own_row(rows_ptr, row_of_ptr, WORDS, ALIGNED)
    factor_ptr = (row_ptr + NUMBERS + 2).to(SINGLES)
    # fmt: off
    step_block(
        program,
        address(row_ptr, ADDRESSES, parameter_ptr.dtype, ALIGNED),
        address(row_ptr, ADDRESSES + 1, gradient_ptr.dtype, ALIGNED),
        address(row_ptr, ADDRESSES + 2, BYTES, ALIGNED),
        address(row_ptr, ADDRESSES + 3, SINGLES, ALIGNED),
        address(row_ptr, ADDRESSES + 4, BYTES, ALIGNED),
        address(row_ptr, ADDRESSES + 5, SINGLES, ALIGNED),
        tl.load(factor_ptr), tl.load(factor_ptr + 1), tl.load(factor_ptr + 2), tl.load(factor_ptr + 3),
        tl.load(factor_ptr + 4), tl.load(factor_ptr + 5), tl.load(factor_ptr + 6), tl.load(factor_ptr + 7),
        tl.load(factor_ptr + 8),
        tl.load(row_ptr + NUMBERS + 1).to(tl.uint64, bitcast=True),
        tl.load(row_ptr + NUMBERS),
        count, WHOLE_COUNTERS, GROUPS, GROUP,
    )
    # fmt: on


def triton_step(jobs: Sequence[Job]) -> None:
    """Take the steps with Triton, a launch for each kind of job; arguments as for `reference`, and the same bits."""
    with torch.cuda.device_of(jobs[0].parameter):
        for kind, positions in grouped(map(_kind, jobs)).items():
            of_kind = [jobs[position] for position in positions]
            launch(of_kind[0], _table(of_kind), *kind[2:])


def _kind(job: Job) -> tuple[torch.dtype, torch.dtype, bool, bool]:
    tensors = (job.parameter, job.gradient, job.state.state1, job.state.state2)
    return job.parameter.dtype, job.gradient.dtype, job.offset % PER_COUNTER == 0, aligned(tensors)


def _table(jobs: Sequence[Job]) -> Table:
    # A signed word holds the bits of a seed.
    numbers = [(job.offset, job.seed - (job.seed >> 63 << 64)) for job in jobs]
    factors = torch.tensor([(*job.factors, 0.0) for job in jobs], dtype=torch.float32, device="cpu")
    words = torch.cat([torch.tensor(numbers, dtype=torch.int64, device="cpu"), factors.view(torch.int64)], dim=1)
    return table([(job.parameter, job.gradient, *job.state.tensors()) for job in jobs], GROUPS * GROUP, words)


def launch(first: Job, jobs: Table, whole_counters: bool, aligned: bool) -> None:
    """Step what is in a table. All numbers are read on the device, so that a CUDA graph may hold the launch."""
    adamw_many_kernel[(len(jobs.row_of),)](
        *(first.parameter, first.gradient, jobs.rows, jobs.row_of),
        *(whole_counters, aligned, GROUPS, GROUP, ADDRESSES, WORDS),
        num_warps=WARPS,
        # A product that the reference rounds is rounded here.
        enable_fp_fusion=False,
    )


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_steps(jobs: Sequence[Job]) -> None:
    """Take one step after the other with native/adamw.cpp, each on all threads."""
    for job in jobs:
        native_step(*job)


# ---- dispatch ----------------------------------------------------------------------------------------------

_OP = register("adamw_8bit_step_many_", unsupported)
_STEP = {"triton": triton_step, "native": native_steps, "reference": reference}


def _run(
    parameters: list[Tensor],
    state1: list[Tensor],
    absmax1: list[Tensor],
    state2: list[Tensor],
    absmax2: list[Tensor],
    gradients: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    steps: list[int],
    gradient_scale: float,
    seed: int,
    offsets: list[int],
) -> None:
    factors = {step: factors_of(lr, beta1, beta2, eps, weight_decay, step, gradient_scale) for step in set(steps)}
    jobs = [
        # The schema's integers are signed: the upper half of the seeds came as negative numbers.
        Job(
            parameter.contiguous(),
            gradient.contiguous(),
            Adam8bitState(*state),
            factors[step],
            seed % (1 << 64),
            offset,
        )
        for parameter, gradient, *state, step, offset in zip(
            parameters, gradients, state1, absmax1, state2, absmax2, steps, offsets, strict=True
        )
        if parameter.numel()
    ]
    if not jobs:
        return
    _STEP[choose(_OP, *parameters, *gradients, *state1, *absmax1, *state2, *absmax2)](jobs)
    stepped = iter(jobs)
    for parameter in parameters:
        if parameter.numel():
            put_back(next(stepped).parameter, parameter)


_step = define_in_place(
    "adamw_8bit_step_many_(Tensor(a!)[] parameters, Tensor(b!)[] state1, Tensor(c!)[] absmax1, Tensor(d!)[] state2, "
    "Tensor(e!)[] absmax2, Tensor[] gradients, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "SymInt[] steps, float gradient_scale, SymInt seed, SymInt[] offsets) -> ()",
    _run,
    written=5,
)


@torch.no_grad()
def adamw_8bit_step_many_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Adam8bitState],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    steps: Sequence[int],
    gradient_scale: float = 1.0,
    seed: int,
    offsets: Sequence[int],
) -> None:
    """Take one step of AdamW on each of `parameters` and its state, in place, as `adamw_8bit_step_` does on one.

    On a GPU the numbers of all steps go there in one copy for each launch, which nothing waits for.

    Args:
        parameters: any shapes, each float32 or bfloat16, on one device; any strides under which no two elements share
            memory. None shares memory with another.
        gradients: for each parameter one of its shape, float32 or bfloat16.
        states: for each parameter its `Adam8bitState`.
        lr: as for `adamw_8bit_step_`, and so are the other numbers.
        beta1: 0 <= beta1 < 1.
        beta2: 0 <= beta2 < 1.
        eps: at least 0.
        weight_decay: at least 0.
        steps: for each parameter the number of its step, from 1 on.
        gradient_scale: multiplies all gradients in float32.
        seed: 0 <= seed < 2^64; for bfloat16.
        offsets: for each parameter the position of its first element's bits.

    Raises:
        ValueError: on lists of different lengths or tensors on different devices, and where `adamw_8bit_step_` raises
            it for one of the parameters.
        TypeError: on DTensors.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    op = "adamw_8bit_step_many_"
    lengths = [len(of_each) for of_each in (parameters, gradients, states, steps, offsets)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{op} needs a gradient, a state, a step and an offset for each parameter, but got {lengths[0]} "
            f"parameters, {lengths[1]} gradients, {lengths[2]} states, {lengths[3]} steps and {lengths[4]} offsets."
        )
    if not parameters:
        return
    for parameter, gradient, state, step, offset in zip(parameters, gradients, states, steps, offsets, strict=True):
        if parameter.device != parameters[0].device:
            raise ValueError(
                f"{op} needs parameters on one device, but they are on {parameters[0].device} and {parameter.device}."
            )
        check_tensors(op, parameter, gradient, state)
        check_numbers(op, lr, beta1, beta2, eps, weight_decay, step)
        check_draws(op, seed, offset, parameter.numel())
    moments = (list(of_all) for of_all in zip(*(state.tensors() for state in states), strict=True))
    numbers = (lr, beta1, beta2, eps, weight_decay, list(steps), gradient_scale)
    signed = seed if seed < 1 << 63 else seed - (1 << 64)
    _step(list(parameters), *moments, list(gradients), *numbers, signed, list(offsets))
