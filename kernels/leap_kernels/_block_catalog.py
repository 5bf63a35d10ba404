"""The Triton kernels of the ops of transformer blocks but `adaln_modulate`, for the catalog.

Rows are 1024 wide, as a block of columns is, and heads have 128 elements.
"""

from __future__ import annotations

from dataclasses import replace

from ._adaln_catalog import SUMMED_PROGRAMS, vectors_in_float32
from ._modulation import STRIP, SUMMED_STRIP
from ._norm_rope_triton import TILE, TOKENS, norm_rope_backward_kernel, norm_rope_kernel
from ._specs import KernelSpec
from .gated_residual import BLOCK as GATED_BLOCK
from .gated_residual import gated_backward_kernel, gated_kernel
from .gelu_tanh import BLOCK as GELU_BLOCK
from .gelu_tanh import gelu_backward_kernel, gelu_kernel
from .swiglu import BLOCK as SWIGLU_BLOCK
from .swiglu import swiglu_backward_kernel, swiglu_kernel

HEAD = 128
"""Elements of a head."""

_GATED = KernelSpec(
    "gated_residual",
    gated_kernel,
    {
        **dict.fromkeys(("x_ptr", "gate_ptr", "y_ptr", "out_ptr"), "*T"),
        **dict.fromkeys(("rows", "strips", "width", "gate_stride"), "i32"),
    },
    {"STRIP": STRIP, "BLOCK": GATED_BLOCK},
    reads=("T", "T"),
    writes=("T",),
    elements=STRIP * GATED_BLOCK,
    common=("gate_ptr",),
)


def _gated_backward(name: str, gate: bool, y: bool) -> KernelSpec:
    strip = SUMMED_STRIP if gate else STRIP
    return KernelSpec(
        name,
        gated_backward_kernel,
        {
            **dict.fromkeys(("grad_ptr", "gate_ptr", "y_ptr"), "*T"),
            **{"sums_ptr": "*fp32", "grad_y_ptr": "*T"},
            **dict.fromkeys(("rows", "strips", "width", "gate_stride"), "i32"),
        },
        {"GATE": gate, "Y": y, "STRIP": strip, "BLOCK": GATED_BLOCK},
        reads=("T", "T") if gate else ("T",),
        writes=("T",) if y else (),
        elements=strip * GATED_BLOCK,
        common=("gate_ptr",),
        shaped=("STRIP",) if gate else (),
        programs=SUMMED_PROGRAMS if gate else 17,
    )


_GELU = KernelSpec(
    "gelu_tanh",
    gelu_kernel,
    {"x_ptr": "*T", "out_ptr": "*T", "count": "i32"},
    {"BLOCK": GELU_BLOCK},
    reads=("T",),
    writes=("T",),
    elements=GELU_BLOCK,
)
_GELU_BACKWARD = KernelSpec(
    "gelu_tanh/backward",
    gelu_backward_kernel,
    {**dict.fromkeys(("grad_ptr", "x_ptr", "out_ptr", "y_ptr"), "*T"), "count": "i32"},
    {"AGAIN": False, "BLOCK": GELU_BLOCK},
    reads=("T", "T"),
    writes=("T",),
    elements=GELU_BLOCK,
)
_GELU_BACKWARD_AGAIN = replace(
    _GELU_BACKWARD,
    name="gelu_tanh/backward_and_again",
    constexprs={"AGAIN": True, "BLOCK": GELU_BLOCK},
    writes=("T", "T"),
)
_SWIGLU = KernelSpec(
    "swiglu",
    swiglu_kernel,
    {
        **dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*T"),
        **dict.fromkeys(("width", "gate_stride", "up_stride"), "i32"),
    },
    {"BLOCK": SWIGLU_BLOCK},
    reads=("T", "T"),
    writes=("T",),
    elements=SWIGLU_BLOCK,
    shaped=("BLOCK",),
)
_SWIGLU_BACKWARD = KernelSpec(
    "swiglu/backward",
    swiglu_backward_kernel,
    {
        **dict.fromkeys(("grad_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr"), "*T"),
        **dict.fromkeys(("width", "gate_stride", "up_stride", "out_stride"), "i32"),
    },
    {"BLOCK": SWIGLU_BLOCK},
    reads=("T", "T", "T"),
    writes=("T", "T"),
    elements=SWIGLU_BLOCK,
    shaped=("BLOCK",),
)
_HEADS = {"WIDTH": HEAD, "LANES": HEAD // 2, "HEADS": TILE // HEAD}
_TABLES = ("weight_ptr", "cos_ptr", "sin_ptr")


def _norm_rope(name: str, rope: bool, halves: bool) -> KernelSpec:
    strides = ("x_batch", "x_token", "x_head", "out_batch", "out_token", "table_batch")
    return KernelSpec(
        name,
        norm_rope_kernel,
        {
            "x_ptr": "*T",
            **dict.fromkeys(_TABLES, "*fp32"),
            "out_ptr": "*T",
            **dict.fromkeys((*strides, "tokens", "heads"), "i32"),
            "eps": "fp32",
        }
        | ({} if rope else {"cos_ptr": "*T", "sin_ptr": "*T"}),
        {**_HEADS, "WEIGHT": True, "ROPE": rope, "HALVES": halves},
        reads=("T",),
        writes=("T",),
        elements=TILE,
        num_warps=2 if halves else 4,
        per_group=_TABLES,
        common=_TABLES,
        shaped=tuple(_HEADS),
    )


def _norm_rope_backward(name: str, weight: bool, halves: bool) -> KernelSpec:
    strides = ("grad_batch", "grad_token", "grad_head", "x_batch", "x_token", "x_head", "table_batch")
    tokens = TOKENS if weight else 1
    return KernelSpec(
        name,
        norm_rope_backward_kernel,
        {
            **{"grad_ptr": "*T", "x_ptr": "*T"},
            **dict.fromkeys(_TABLES, "*fp32"),
            **{"out_ptr": "*T", "partial_ptr": "*fp32" if weight else "*T"},
            **dict.fromkeys((*strides, "samples", "tokens", "heads"), "i32"),
            "eps": "fp32",
        },
        {**_HEADS, "TOKENS": tokens, "WEIGHT": True, "WEIGHT_WANTED": weight, "ROPE": True, "HALVES": halves},
        reads=("T", "T"),
        writes=("T",),
        elements=tokens * TILE,
        num_warps=2 if halves else 4,
        per_group=(*_TABLES, "partial_ptr"),
        common=_TABLES,
        shaped=tuple(_HEADS),
    )


_GATED_BACKWARD = _gated_backward("gated_residual/backward", True, True)
GATED_KERNELS = (
    _GATED,
    vectors_in_float32(_GATED, "gated_residual/float32_gate", "gate_ptr"),
    _GATED_BACKWARD,
    _gated_backward("gated_residual/backward_of_gate", True, False),
    _gated_backward("gated_residual/backward_of_y", False, True),
    vectors_in_float32(_GATED_BACKWARD, "gated_residual/backward_float32_gate", "gate_ptr"),
)
GELU_KERNELS = (_GELU, _GELU_BACKWARD, _GELU_BACKWARD_AGAIN)
# Packed halves are rows of the same kernels, further apart.
SWIGLU_KERNELS = (
    _SWIGLU,
    replace(_SWIGLU, name="swiglu/packed"),
    _SWIGLU_BACKWARD,
    replace(_SWIGLU_BACKWARD, name="swiglu/packed_backward"),
)
NORM_ROPE_KERNELS = (
    _norm_rope("qk_norm_rope", True, False),
    _norm_rope("qk_norm_rope/halves", True, True),
    _norm_rope("qk_norm_rope/norm_only", False, False),
    _norm_rope_backward("qk_norm_rope/backward", True, False),
    _norm_rope_backward("qk_norm_rope/backward_halves", True, True),
    _norm_rope_backward("qk_norm_rope/backward_frozen", False, False),
)
