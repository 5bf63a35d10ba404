"""Every op with its formula, and every Triton kernel with what it takes to compile it and to count its bytes."""

from __future__ import annotations

from dataclasses import replace

import torch

from ._adamw_8bit import GROUPS, Factors
from ._adamw_8bit import WARPS as ADAMW_WARPS
from ._many import ADDRESSES
from ._moments import GROUP
from ._specs import KernelSpec, OpSpec
from .accumulate import BLOCK as ACCUMULATE_BLOCK
from .accumulate import accumulate_kernel
from .adamw_8bit_step import adamw_kernel
from .adamw_8bit_step_many import WORDS as ADAMW_WORDS
from .adamw_8bit_step_many import adamw_many_kernel
from .combine_gradient_terms import BLOCK as COMBINE_BLOCK
from .combine_gradient_terms import combine_kernel
from .consistency_weighted_loss import BLOCK as LOSS_BLOCK
from .consistency_weighted_loss import WARPS as LOSS_WARPS
from .consistency_weighted_loss import loss_kernel
from .ema_update import BLOCK as EMA_BLOCK
from .ema_update import ema_kernel
from .euler_step import BLOCK as EULER_BLOCK
from .euler_step import euler_kernel
from .leap_distances import BLOCK as DISTANCES_BLOCK
from .leap_distances import distances_kernel
from .leap_update import BLOCK as LEAP_BLOCK
from .leap_update import connector_kernel
from .scale_gradient import BLOCK as SCALE_BLOCK
from .scale_gradient import scale_kernel
from .stochastic_round import BLOCK as ROUND_BLOCK
from .stochastic_round import round_kernel
from .total_norm import BLOCK as NORM_BLOCK
from .total_norm import WORDS as NORM_WORDS
from .total_norm import squares_kernel

_BLOCKED = {"per_sample": "i32", "blocks": "i32"}
_ANY = (torch.float32,)


def _scale(name: str, twice: bool) -> KernelSpec:
    return KernelSpec(
        name,
        scale_kernel,
        {
            **{"grad_ptr": "*T", "factor_ptr": "*fp32", "out_ptr": "*T"},
            **{"second_factor_ptr": "*fp32", "second_out_ptr": "*T"},
            **_BLOCKED,
        },
        {"TWICE": twice, "BLOCK": SCALE_BLOCK},
        reads=("T",),
        writes=("T", "T") if twice else ("T",),
        elements=SCALE_BLOCK,
    )


def _combine(name: str, norms: bool, out: bool) -> KernelSpec:
    return KernelSpec(
        name,
        combine_kernel,
        {
            **{"direct_ptr": "*T", "nested_ptr": "*T", "coefficient_ptr": "*fp32", "share_ptr": "*fp32"},
            **{"out_ptr": "*T", "direct_norm_ptr": "*fp32", "nested_norm_ptr": "*fp32"},
            **_BLOCKED,
        },
        {"NORMS": norms, "OUT": out, "BLOCK": COMBINE_BLOCK},
        reads=("T", "T"),
        writes=("T",) if out else (),
        elements=COMBINE_BLOCK,
    )


def _euler(name: str, guided: bool) -> KernelSpec:
    return KernelSpec(
        name,
        euler_kernel,
        {
            **dict.fromkeys(("x_ptr", "velocity_ptr", "uncond_ptr"), "*T"),
            **{"delta_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": "*T"},
            **_BLOCKED,
        },
        {"GUIDED": guided, "BLOCK": EULER_BLOCK},
        reads=("T", "T", "T") if guided else ("T", "T"),
        writes=("T",),
        elements=EULER_BLOCK,
    )


_DISTANCES = KernelSpec(
    "leap_distances",
    distances_kernel,
    {
        **dict.fromkeys(("x_k_ptr", "v_k_ptr", "x_j_ptr", "v_j_ptr", "x_end_ptr"), "*T"),
        **dict.fromkeys(("delta_ptr", "sigma_j_ptr", "first_ptr", "second_ptr"), "*fp32"),
        **_BLOCKED,
    },
    {"BLOCK": DISTANCES_BLOCK},
    reads=("T",) * 5,
    writes=(),
    elements=DISTANCES_BLOCK,
)
_CONNECTOR = KernelSpec(
    "leap_update",
    connector_kernel,
    {
        **dict.fromkeys(("x_ptr", "velocity_ptr", "target_ptr"), "*T"),
        **{"delta_ptr": "*fp32", "out_ptr": "*T", "partial_ptr": "*fp32"},
        **_BLOCKED,
    },
    {"BLOCK": LEAP_BLOCK},
    reads=("T", "T", "T"),
    writes=("T",),
    elements=LEAP_BLOCK,
)
_LOSS = KernelSpec(
    "consistency_weighted_loss",
    loss_kernel,
    {
        **dict.fromkeys(("reward_ptr", "distances_ptr", "loss_ptr", "weight_ptr"), "*fp32"),
        **{"threshold": "fp32", "tau": "fp32", "batch": "i32"},
    },
    # Two leaps. The elements are samples, of which one program takes all, a block at a time.
    {"COUNT": 2, "BLOCK": LOSS_BLOCK},
    reads=("fp32", "fp32", "fp32"),
    writes=("fp32",),
    elements=LOSS_BLOCK,
    num_warps=LOSS_WARPS,
    dtypes=_ANY,
)
_ROUND = KernelSpec(
    "stochastic_round_",
    round_kernel,
    {"dst_ptr": "*bf16", "src_ptr": "*fp32", "seed": "u64", "first": "i64", "skipped": "i32", "count": "i32"},
    {"BLOCK": ROUND_BLOCK},
    reads=("fp32",),
    writes=("bf16",),
    elements=ROUND_BLOCK,
    dtypes=_ANY,
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


OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "leap_update",
        "xhat = x - (sigma_from - sigma_to) * velocity; with a target, its value and the gradient of xhat",
        (_CONNECTOR, _euler("leap_update/no_target", False), _scale("leap_update/backward", False)),
    ),
    OpSpec(
        "leap_distances",
        "d_j = mean|x_j - (x_k - (sigma_k - sigma_j) * v_k)|, d_end = mean|x_end - (x_j - sigma_j * v_j)|",
        (_DISTANCES,),
    ),
    OpSpec(
        "consistency_weighted_loss",
        "mean_b w_b * max(0, threshold - r_b), w = 1 / sum_i max(d_i, tau)",
        (_LOSS,),
    ),
    OpSpec("scale_gradient", "x; its gradient times factor", (_scale("scale_gradient/backward", False),)),
    OpSpec(
        "combine_gradient_terms",
        "coefficient * (direct + alpha * s * nested), s = min(1, max_ratio * |direct| / |nested|)",
        (
            _combine("combine_gradient_terms", True, True),
            _combine("combine_gradient_terms/norms", True, False),
            _combine("combine_gradient_terms/limited", False, True),
        ),
    ),
    OpSpec(
        "euler_step",
        "x + (sigma_next - sigma) * v, v = uncond + scale * (velocity - uncond) with guidance",
        (
            _euler("euler_step", False),
            _euler("euler_step/guidance", True),
            _scale("euler_step/backward", False),
            _scale("euler_step/guidance_backward", True),
        ),
    ),
    OpSpec("stochastic_round_", "src rounded to bfloat16, up or down with the odds that make it unbiased", (_ROUND,)),
    OpSpec("accumulate_", "total + value, in one pass, whatever their dtypes", (_ACCUMULATE,)),
    OpSpec("ema_update_", "average + (1 - decay) * (weights - average)", (_EMA,)),
    OpSpec(
        "adamw_8bit_step_",
        "parameter - lr * (mhat / (sqrt(vhat) + eps) + weight_decay * parameter), 8-bit m, v",
        (
            _adamw("", "bf16", True),
            # An offset that is no multiple of 8.
            _adamw("/any_offset", "bf16", False),
            _adamw("/float32", "fp32", True),
        ),
    ),
    OpSpec(
        "adamw_8bit_step_many_",
        "adamw_8bit_step_ of each parameter, in one launch",
        (
            _adamw_many("", "bf16", True),
            _adamw_many("/any_offset", "bf16", False),
            _adamw_many("/float32", "fp32", True),
        ),
    ),
    OpSpec("total_norm", "sqrt(sum of the squares of all elements of all tensors), in one launch", (_SQUARES,)),
    OpSpec("adaln_modulate", "(x - mean) * rstd * (1 + scale) + shift, mean and rstd of each row"),
    OpSpec("gated_residual", "x + gate * y"),
    OpSpec("group_norm_silu", "silu((x - mean) * rstd * weight + bias), mean and rstd of each group of channels"),
    OpSpec("qk_norm_rope", "queries and keys * rsqrt(mean(x^2) + eps) * weight of each head, turned by their position"),
    OpSpec("gelu_tanh", "0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))"),
    OpSpec("swiglu", "gate * sigmoid(gate) * up"),
)
