"""What a GPU has to have beside what PyTorch's allocator reserves: stated, not measured here."""

from __future__ import annotations

DRIVER = 0.015
"""Share of the memory that a card is sold with that the driver keeps: of 80 GiB PyTorch sees some 79, of 24 some 23.6.
A card that corrects errors within its GDDR memory keeps more, an L40S 7 %."""
CONTEXT = 600 * 2**20
"""Bytes of CUDA's context and of the kernels that are loaded as they are needed."""
WORKSPACES = 544 * 2**20
"""Bytes of scratch memory: cuBLAS's, 32 MiB on Hopper (PyTorch's default for CUBLAS_WORKSPACE_CONFIG), and cuDNN's for
the convolutions of a decoder. No simulated tensor is either."""


def allowance(gpu_memory: int) -> int:
    """Bytes of ``gpu_memory``, as a card is sold, that no tensor can have."""
    return int(gpu_memory * DRIVER) + CONTEXT + WORKSPACES
