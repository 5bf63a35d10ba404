"""How the catalog describes a kernel: what it takes to compile it and to count its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

LATENTS = "T"
"""Stands for the dtype of the latents in `KernelSpec`: `*T` is a pointer to them."""

TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "u8": 1}


@dataclass(frozen=True)
class KernelSpec:
    """One Triton kernel with one choice of its constants."""

    name: str
    """Unique: `op` or `op/variant`."""
    kernel: Any
    """The function that `triton.jit` decorated."""
    arguments: Mapping[str, str]
    """Run-time arguments in order, with Triton's names of types at sizes below 2^31; `*T` points to latents."""
    constexprs: Mapping[str, object]
    reads: tuple[str, ...]
    """Type of each tensor that is read, once an element: `T`, `fp32`, `bf16` or `u8`."""
    writes: tuple[str, ...]
    """Type of each tensor that is written, once an element."""
    elements: int
    """Elements that one program handles."""
    num_warps: int = 4
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """Dtypes of the latents that the kernel takes."""
    per_group: tuple[str, ...] = ()
    """Arguments with one number for many elements: too few bytes for the width of their accesses to matter."""
    common: tuple[str, ...] = ()
    """Arguments that many programs read, from caches but for the first: they count neither as bytes moved nor least."""
    shaped: tuple[str, ...] = ()
    """Constants that follow from the shape; here they are those of the shape that `audit` launches."""
    programs: int = 17
    """Programs of a sample in the audit; no multiple of 16, for which Triton would compile a version of its own."""
    sums_only: bool = False
    """Whether it works on sums of many elements: too few bytes for their count to matter."""
    stochastic: tuple[str, ...] = ()
    """Arguments that are rounded stochastically to 16 bits; all others are to nearest, ties to even."""
    fp_fusion: bool = True
    """Whether the compiler may round a product and a sum as one."""
    row: tuple[str, ...] = ()
    """Words of a row of its table (`_many`), those of tensors called `..._ptr`; none without a table."""

    def signature(self, dtype: torch.dtype) -> dict[str, str]:
        """Return the type of every argument, for latents of `dtype`; constants are `constexpr`."""
        types = {name: kind.replace(LATENTS, TRITON_NAMES[dtype]) for name, kind in self.arguments.items()}
        return {**types, **dict.fromkeys(self.constexprs, "constexpr")}

    def least_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes an element costs at least: each tensor read or written once."""
        return sum(_BYTES[kind.replace(LATENTS, TRITON_NAMES[dtype])] for kind in self.reads + self.writes)


@dataclass(frozen=True)
class OpSpec:
    """An op as its user sees it."""

    name: str
    formula: str
    kernels: tuple[KernelSpec, ...] = ()
