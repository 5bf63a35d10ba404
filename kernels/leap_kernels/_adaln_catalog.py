"""The Triton kernels of `adaln_modulate`, for the catalog: of rows of 3072, as FLUX's are, and of some too wide for a
program's registers.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ._adaln_triton import adaln_backward_kernel, adaln_kernel, block_and_warps
from ._adaln_wide import BLOCK as WIDE_BLOCK
from ._adaln_wide import WARPS as WIDE_WARPS
from ._adaln_wide import wide_backward_kernel, wide_kernel, wide_row_sums_kernel
from ._modulation import STRIP, SUMMED_STRIP
from ._specs import KernelSpec

ROW = 3072
"""Elements of a row of a block's stream."""
WIDE_ROW = 6 * WIDE_BLOCK
SUMMED_PROGRAMS = 257
"""Enough for programs to sum the longer strips."""
_BFLOAT16 = (torch.bfloat16,)


def vectors_in_float32(spec: KernelSpec, name: str, *vectors: str) -> KernelSpec:
    """Return the kernel for bfloat16 rows that float32 vectors modulate."""
    return replace(spec, name=name, arguments={**spec.arguments, **dict.fromkeys(vectors, "*fp32")}, dtypes=_BFLOAT16)


def _adaln(name: str, shift: bool) -> KernelSpec:
    block, warps = block_and_warps(ROW)
    return KernelSpec(
        name,
        adaln_kernel,
        {
            **dict.fromkeys(("x_ptr", "shift_ptr", "scale_ptr", "out_ptr"), "*T"),
            "statistics_ptr": "*fp32",
            **dict.fromkeys(("rows", "all_rows", "strips", "width", "shift_stride", "scale_stride"), "i32"),
            "eps": "fp32",
        },
        {"SHIFT": shift, "STRIP": STRIP, "BLOCK": block},
        reads=("T",),
        writes=("T",),
        elements=STRIP * ROW,
        num_warps=warps,
        per_group=("statistics_ptr",),
        common=("shift_ptr", "scale_ptr"),
        shaped=("BLOCK",),
    )


def _adaln_backward(name: str, sums: bool) -> KernelSpec:
    block, warps = block_and_warps(ROW, sums)
    strip = SUMMED_STRIP if sums else STRIP
    return KernelSpec(
        name,
        adaln_backward_kernel,
        {
            **dict.fromkeys(("grad_ptr", "x_ptr", "scale_ptr"), "*T"),
            **{"statistics_ptr": "*fp32", "grad_x_ptr": "*T", "sums_ptr": "*fp32"},
            **dict.fromkeys(("rows", "all_rows", "strips", "width", "scale_stride"), "i32"),
        },
        {"SUMS": sums, "STRIP": strip, "BLOCK": block},
        reads=("T", "T"),
        writes=("T",),
        elements=strip * ROW,
        num_warps=warps,
        per_group=("statistics_ptr",),
        common=("scale_ptr",),
        shaped=("STRIP", "BLOCK") if sums else ("BLOCK",),
        programs=SUMMED_PROGRAMS if sums else 17,
    )


_WIDE = replace(
    _adaln("adaln_modulate/wide", True),
    kernel=wide_kernel,
    constexprs={"SHIFT": True, "STRIP": STRIP, "BLOCK": WIDE_BLOCK},
    # Twice, block by block.
    reads=("T", "T"),
    elements=STRIP * WIDE_ROW,
    num_warps=WIDE_WARPS,
    shaped=(),
)
_WIDE_ROW_SUMS = KernelSpec(
    "adaln_modulate/wide_row_sums",
    wide_row_sums_kernel,
    {
        **dict.fromkeys(("grad_ptr", "x_ptr", "scale_ptr"), "*T"),
        **dict.fromkeys(("statistics_ptr", "means_ptr"), "*fp32"),
        **dict.fromkeys(("rows", "all_rows", "strips", "width", "scale_stride"), "i32"),
    },
    {"STRIP": STRIP, "BLOCK": WIDE_BLOCK},
    reads=("T", "T"),
    writes=(),
    elements=STRIP * WIDE_ROW,
    num_warps=WIDE_WARPS,
    per_group=("statistics_ptr", "means_ptr"),
    common=("scale_ptr",),
)


def _wide_backward(name: str, sums: bool) -> KernelSpec:
    strip = SUMMED_STRIP if sums else STRIP
    return KernelSpec(
        name,
        wide_backward_kernel,
        {
            **dict.fromkeys(("grad_ptr", "x_ptr", "scale_ptr"), "*T"),
            **dict.fromkeys(("statistics_ptr", "means_ptr"), "*fp32"),
            **{"grad_x_ptr": "*T", "sums_ptr": "*fp32"},
            **dict.fromkeys(("rows", "all_rows", "strips", "blocks", "width", "scale_stride"), "i32"),
        },
        {"SUMS": sums, "STRIP": strip, "BLOCK": WIDE_BLOCK},
        reads=("T", "T"),
        writes=("T",),
        elements=strip * WIDE_BLOCK,
        num_warps=WIDE_WARPS,
        per_group=("statistics_ptr", "means_ptr"),
        common=("scale_ptr",),
        shaped=("STRIP",) if sums else (),
        # Six of each strip.
        programs=6 * 43,
    )


_MODULATE = _adaln("adaln_modulate", True)
_MODULATE_BACKWARD = _adaln_backward("adaln_modulate/backward_sums", True)
ADALN_KERNELS = (
    _MODULATE,
    _adaln("adaln_modulate/no_shift", False),
    vectors_in_float32(_MODULATE, "adaln_modulate/float32_vectors", "shift_ptr", "scale_ptr"),
    _adaln_backward("adaln_modulate/backward", False),
    _MODULATE_BACKWARD,
    vectors_in_float32(_MODULATE_BACKWARD, "adaln_modulate/backward_float32_vectors", "scale_ptr"),
    _WIDE,
    _WIDE_ROW_SUMS,
    _wide_backward("adaln_modulate/wide_backward", False),
    _wide_backward("adaln_modulate/wide_backward_sums", True),
)
