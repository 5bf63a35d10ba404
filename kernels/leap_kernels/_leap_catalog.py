"""The Triton kernels of the ops on latents, for the catalog; latents may stay float32 where velocities are bfloat16."""

from __future__ import annotations

import torch

from ._specs import KernelSpec
from .combine_gradient_terms import BLOCK as COMBINE_BLOCK
from .combine_gradient_terms import combine_kernel
from .consistency_weighted_loss import BLOCK as LOSS_BLOCK
from .consistency_weighted_loss import WARPS as LOSS_WARPS
from .consistency_weighted_loss import loss_kernel
from .euler_step import BLOCK as EULER_BLOCK
from .euler_step import euler_kernel
from .leap_distances import BLOCK as DISTANCES_BLOCK
from .leap_distances import distances_kernel
from .leap_update import BLOCK as LEAP_BLOCK
from .leap_update import connector_kernel
from .scale_gradient import BLOCK as SCALE_BLOCK
from .scale_gradient import scale_kernel

_BLOCKED = {"per_sample": "i32", "blocks": "i32"}
_FLOAT32 = "fp32"


def _dtypes(x: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes of velocities, whose type is `T`; beside latents that stay float32 it is bfloat16."""
    return KernelSpec.dtypes if x == "T" else (torch.bfloat16,)


def _scale(name: str, twice: bool, grad: str = "T") -> KernelSpec:
    return KernelSpec(
        name,
        scale_kernel,
        {
            **{"grad_ptr": f"*{grad}", "factor_ptr": "*fp32", "out_ptr": "*T"},
            **{"second_factor_ptr": "*fp32", "second_out_ptr": "*T"},
            **_BLOCKED,
        },
        {"TWICE": twice, "BLOCK": SCALE_BLOCK},
        reads=(grad,),
        writes=("T", "T") if twice else ("T",),
        elements=SCALE_BLOCK,
        dtypes=_dtypes(grad),
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


def _euler(name: str, guided: bool, x: str = "T") -> KernelSpec:
    return KernelSpec(
        name,
        euler_kernel,
        {
            **{"x_ptr": f"*{x}", "velocity_ptr": "*T", "uncond_ptr": "*T"},
            **{"delta_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": f"*{x}"},
            **_BLOCKED,
        },
        {"GUIDED": guided, "BLOCK": EULER_BLOCK},
        reads=(x, "T", "T") if guided else (x, "T"),
        writes=(x,),
        elements=EULER_BLOCK,
        dtypes=_dtypes(x),
    )


def _distances(name: str, x: str = "T") -> KernelSpec:
    return KernelSpec(
        name,
        distances_kernel,
        {
            **{"x_k_ptr": f"*{x}", "v_k_ptr": "*T", "x_j_ptr": f"*{x}", "v_j_ptr": "*T", "x_end_ptr": f"*{x}"},
            **dict.fromkeys(("delta_ptr", "sigma_j_ptr", "first_ptr", "second_ptr"), "*fp32"),
            **_BLOCKED,
        },
        {"BLOCK": DISTANCES_BLOCK},
        reads=(x, "T", x, "T", x),
        writes=(),
        elements=DISTANCES_BLOCK,
        dtypes=_dtypes(x),
    )


def _connector(name: str, x: str = "T") -> KernelSpec:
    return KernelSpec(
        name,
        connector_kernel,
        {
            **{"x_ptr": f"*{x}", "velocity_ptr": "*T", "target_ptr": f"*{x}"},
            **{"delta_ptr": "*fp32", "out_ptr": f"*{x}", "partial_ptr": "*fp32"},
            **_BLOCKED,
        },
        {"BLOCK": LEAP_BLOCK},
        reads=(x, "T", x),
        writes=(x,),
        elements=LEAP_BLOCK,
        dtypes=_dtypes(x),
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
    dtypes=(torch.float32,),
)

LEAP_KERNELS = (
    _connector("leap_update"),
    _connector("leap_update/float32_x", _FLOAT32),
    _euler("leap_update/no_target", False),
    _scale("leap_update/backward", False),
)
DISTANCES_KERNELS = (_distances("leap_distances"), _distances("leap_distances/float32_x", _FLOAT32))
LOSS_KERNELS = (_LOSS,)
SCALE_KERNELS = (_scale("scale_gradient/backward", False),)
COMBINE_KERNELS = (
    _combine("combine_gradient_terms", True, True),
    _combine("combine_gradient_terms/norms", True, False),
    _combine("combine_gradient_terms/limited", False, True),
)
EULER_KERNELS = (
    _euler("euler_step", False),
    _euler("euler_step/float32_x", False, _FLOAT32),
    _euler("euler_step/guidance", True),
    _euler("euler_step/guidance_float32_x", True, _FLOAT32),
    _scale("euler_step/backward", False),
    _scale("euler_step/backward_float32_x", False, _FLOAT32),
    _scale("euler_step/guidance_backward", True),
    _scale("euler_step/guidance_backward_float32_x", True, _FLOAT32),
)
