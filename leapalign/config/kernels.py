"""What of a run computes with the ops of `leap_kernels`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelsConfig:
    patch: bool = False
    """Have blocks of the transformer and of the decoder compute with the ops of `leap_kernels`: faster on a CPU with
    the native library, not measured on a GPU. They round otherwise than PyTorch's operations."""
