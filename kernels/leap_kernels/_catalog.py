"""Every op with its formula, and every Triton kernel with what it takes to compile it and to count its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .leap_update import BLOCK as LEAP_BLOCK
from .leap_update import _forward_kernel as leap_forward

LATENTS = "T"
"""Stands for the dtype of the latents in `KernelSpec`: `*T` is a pointer to them."""

TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class KernelSpec:
    """One Triton kernel with one choice of its constants."""

    name: str
    """Unique: `op` or `op/variant`."""
    kernel: Any
    """The function that `triton.jit` decorated."""
    arguments: Mapping[str, str]
    """Run-time arguments in order, with Triton's names of types; `*T` points to latents."""
    constexprs: Mapping[str, object]
    reads: tuple[str, ...]
    """Type of each tensor that is read, once an element: `T`, `fp32` or `bf16`."""
    writes: tuple[str, ...]
    """Type of each tensor that is written, once an element."""
    elements: int
    """Elements that one program handles."""
    num_warps: int = 4
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """Dtypes of the latents that the kernel takes."""

    def signature(self, dtype: torch.dtype) -> dict[str, str]:
        """Return the type of every argument, for latents of `dtype`; constants are `constexpr`."""
        types = {name: kind.replace(LATENTS, TRITON_NAMES[dtype]) for name, kind in self.arguments.items()}
        return {**types, **dict.fromkeys(self.constexprs, "constexpr")}

    def aligned(self) -> tuple[str, ...]:
        """Return the arguments that are multiples of 16 (bytes or elements) for aligned tensors."""
        return tuple(name for name, kind in self.arguments.items() if kind.startswith("*") or name in _SIZES)

    def least_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes an element costs at least: each tensor read or written once."""
        return sum(_BYTES[kind.replace(LATENTS, TRITON_NAMES[dtype])] for kind in self.reads + self.writes)


@dataclass(frozen=True)
class OpSpec:
    """An op as its user sees it."""

    name: str
    formula: str
    kernels: tuple[KernelSpec, ...] = ()


_SIZES = ("per_sample", "count")

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "leap_update",
        "xhat = x - (sigma_from - sigma_to) * velocity",
        (
            KernelSpec(
                "leap_update",
                leap_forward,
                {
                    "x_ptr": "*T",
                    "velocity_ptr": "*T",
                    "target_ptr": "*T",
                    "delta_ptr": "*fp32",
                    "out_ptr": "*T",
                    "partial_ptr": "*fp32",
                    "per_sample": "i32",
                    "blocks": "i32",
                },
                {"HAS_TARGET": False, "BLOCK": LEAP_BLOCK},
                reads=("T", "T"),
                writes=("T",),
                elements=LEAP_BLOCK,
            ),
        ),
    ),
)
