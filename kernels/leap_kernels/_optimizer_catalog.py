"""The Triton kernels of the ops on weights and their gradients, for the catalog."""

from __future__ import annotations

from dataclasses import replace

import torch

from ._adamw_8bit import GROUPS, Factors
from ._adamw_8bit import WARPS as ADAMW_WARPS
from ._many import ADDRESSES
from ._moments import GROUP
from ._specs import KernelSpec
from .accumulate import BLOCK as ACCUMULATE_BLOCK
from .accumulate import accumulate_kernel
from .adamw_8bit_step import adamw_kernel
from .adamw_8bit_step_many import WORDS as ADAMW_WORDS
from .adamw_8bit_step_many import adamw_many_kernel
from .ema_update import BLOCK as EMA_BLOCK
from .ema_update import ema_kernel
from .stochastic_round import BLOCK as ROUND_BLOCK
from .stochastic_round import round_kernel
from .total_norm import BLOCK as NORM_BLOCK
from .total_norm import WORDS as NORM_WORDS
from .total_norm import squares_kernel

_ROUND = KernelSpec(
    "stochastic_round_",
    round_kernel,
    {"dst_ptr": "*bf16", "src_ptr": "*fp32", "seed": "u64", "first": "i64", "skipped": "i32", "count": "i32"},
    {"BLOCK": ROUND_BLOCK},
    reads=("fp32",),
    writes=("bf16",),
    elements=ROUND_BLOCK,
    stochastic=("dst_ptr",),
    dtypes=(torch.float32,),
)
_ACCUMULATE = KernelSpec(
    "accumulate_",
    accumulate_kernel,
    {"total_ptr": "*fp32", "value_ptr": "*T", "count": "i32"},
    {"BLOCK": ACCUMULATE_BLOCK},
    reads=("fp32", "T"),
    writes=("fp32",),
    elements=ACCUMULATE_BLOCK,
)
_EMA = KernelSpec(
    "ema_update_",
    ema_kernel,
    {"average_ptr": "*fp32", "weights_ptr": "*T", "step": "fp32", "count": "i32"},
    {"BLOCK": EMA_BLOCK},
    reads=("fp32", "T"),
    writes=("fp32",),
    elements=EMA_BLOCK,
)


def _adamw(variant: str, weights: str, whole_counters: bool) -> KernelSpec:
    """Return the step of weights of a type, with gradients in the dtype of the latents."""
    return KernelSpec(
        f"adamw_8bit_step_{variant}",
        adamw_kernel,
        {
            **{"parameter_ptr": f"*{weights}", "gradient_ptr": "*T"},
            **{"state1_ptr": "*u8", "absmax1_ptr": "*fp32", "state2_ptr": "*u8", "absmax2_ptr": "*fp32"},
            **dict.fromkeys(Factors._fields, "fp32"),
            **{"seed": "u64", "offset": "i64", "count": "i32"},
        },
        {"WHOLE_COUNTERS": whole_counters, "GROUPS": GROUPS, "GROUP": GROUP},
        reads=(weights, "T", "u8", "u8"),
        writes=(weights, "u8", "u8"),
        elements=GROUPS * GROUP,
        num_warps=ADAMW_WARPS,
        dtypes=(torch.float32, torch.bfloat16),
        per_group=("absmax1_ptr", "absmax2_ptr"),
        stochastic=("parameter_ptr",) if weights == "bf16" else (),
        fp_fusion=False,
    )


_MANY = {"rows_ptr": "*i64", "row_of_ptr": "*i32"}
_ROW = ("first", "programs", "count")


def _adamw_many(variant: str, weights: str, whole_counters: bool) -> KernelSpec:
    """Return the step of many weights of a type, with gradients in the dtype of the latents."""
    one = _adamw(variant, weights, whole_counters)
    pointers = ("parameter_ptr", "gradient_ptr", "state1_ptr", "absmax1_ptr", "state2_ptr", "absmax2_ptr")
    return replace(
        one,
        name=f"adamw_8bit_step_many_{variant}",
        kernel=adamw_many_kernel,
        arguments={"parameter_ptr": f"*{weights}", "gradient_ptr": "*T", **_MANY},
        constexprs={
            **{"WHOLE_COUNTERS": whole_counters, "ALIGNED": True, "GROUPS": GROUPS, "GROUP": GROUP},
            **{"ADDRESSES": ADDRESSES, "WORDS": ADAMW_WORDS},
        },
        row=(*_ROW, *pointers, "offset", "seed"),
    )


_SQUARES = KernelSpec(
    "total_norm",
    squares_kernel,
    {"value_ptr": "*T", **_MANY, "squares_ptr": "*fp32"},
    {"ALIGNED": True, "BLOCK": NORM_BLOCK, "ADDRESSES": ADDRESSES, "WORDS": NORM_WORDS},
    reads=("T",),
    writes=(),
    elements=NORM_BLOCK,
    row=(*_ROW, "tensor_ptr"),
)
ROUND_KERNELS = (_ROUND,)
ACCUMULATE_KERNELS = (_ACCUMULATE,)
EMA_KERNELS = (_EMA,)
ADAMW_KERNELS = (
    _adamw("", "bf16", True),
    # An offset that is no multiple of 8.
    _adamw("/any_offset", "bf16", False),
    _adamw("/float32", "fp32", True),
)
ADAMW_MANY_KERNELS = (
    _adamw_many("", "bf16", True),
    _adamw_many("/any_offset", "bf16", False),
    _adamw_many("/float32", "fp32", True),
)
NORM_KERNELS = (_SQUARES,)
