"""Every op with its formula, and every Triton kernel with what it takes to compile it and to count its bytes."""

from __future__ import annotations

from ._adaln_catalog import ADALN_KERNELS
from ._block_catalog import GATED_KERNELS, GELU_KERNELS, NORM_ROPE_KERNELS, SWIGLU_KERNELS
from ._group_norm_catalog import GROUP_NORM_KERNELS
from ._leap_catalog import (
    COMBINE_KERNELS,
    DISTANCES_KERNELS,
    EULER_KERNELS,
    LEAP_KERNELS,
    LOSS_KERNELS,
    SCALE_KERNELS,
)
from ._optimizer_catalog import (
    ACCUMULATE_KERNELS,
    ADAMW_KERNELS,
    ADAMW_MANY_KERNELS,
    EMA_KERNELS,
    NORM_KERNELS,
    ROUND_KERNELS,
)
from ._specs import OpSpec

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "leap_update",
        "xhat = x - (sigma_from - sigma_to) * velocity; with a target, its value and the gradient of xhat",
        LEAP_KERNELS,
    ),
    OpSpec(
        "leap_distances",
        "d_j = mean|x_j - (x_k - (sigma_k - sigma_j) * v_k)|, d_end = mean|x_end - (x_j - sigma_j * v_j)|",
        DISTANCES_KERNELS,
    ),
    OpSpec(
        "consistency_weighted_loss",
        "mean_b w_b * max(0, threshold - r_b), w = 1 / sum_i max(d_i, tau)",
        LOSS_KERNELS,
    ),
    OpSpec("scale_gradient", "x; its gradient times factor", SCALE_KERNELS),
    OpSpec(
        "combine_gradient_terms",
        "coefficient * (direct + alpha * s * nested), s = min(1, max_ratio * |direct| / |nested|)",
        COMBINE_KERNELS,
    ),
    OpSpec(
        "euler_step",
        "x + (sigma_next - sigma) * v, v = uncond + scale * (velocity - uncond) with guidance",
        EULER_KERNELS,
    ),
    OpSpec(
        "stochastic_round_", "src rounded to bfloat16, up or down with the odds that make it unbiased", ROUND_KERNELS
    ),
    OpSpec("accumulate_", "total + value, in one pass, whatever their dtypes", ACCUMULATE_KERNELS),
    OpSpec("ema_update_", "average + (1 - decay) * (weights - average)", EMA_KERNELS),
    OpSpec(
        "adamw_8bit_step_",
        "parameter - lr * (mhat / (sqrt(vhat) + eps) + weight_decay * parameter), 8-bit m, v",
        ADAMW_KERNELS,
    ),
    OpSpec(
        "adamw_8bit_step_many_",
        "adamw_8bit_step_ of each parameter, in one launch",
        ADAMW_MANY_KERNELS,
    ),
    OpSpec("total_norm", "sqrt(sum of the squares of all elements of all tensors), in one launch", NORM_KERNELS),
    OpSpec("adaln_modulate", "(x - mean) * rstd * (1 + scale) + shift, mean and rstd of each row", ADALN_KERNELS),
    OpSpec("gated_residual", "x + gate * y", GATED_KERNELS),
    OpSpec(
        "group_norm_silu",
        "silu((x - mean) * rstd * weight + bias), mean and rstd of each group of channels",
        GROUP_NORM_KERNELS,
    ),
    OpSpec(
        "qk_norm_rope",
        "queries and keys * rsqrt(mean(x^2) + eps) * weight of each head, turned by their position",
        NORM_ROPE_KERNELS,
    ),
    OpSpec("gelu_tanh", "0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))", GELU_KERNELS),
    OpSpec("swiglu", "gate * sigmoid(gate) * up", SWIGLU_KERNELS),
)
