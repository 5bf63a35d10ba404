"""Gradients that leave the device the moment they are complete, and add up in host memory, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leapalign.memory.residency import host_memory, note_traffic


class HostGradients:
    """Sums of gradients: exact accumulation, and all of them there before the first weight moves."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        with host_memory("gradients"):
            self._sums: dict[Tensor, Tensor] = {
                p: torch.zeros_like(p, dtype=torch.float32, device="cpu") for p in parameters
            }

    @torch.no_grad()
    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """A `leapalign.surrogate.GradientSink`."""
        note_traffic("to_host", gradient.nbytes)
        with host_memory("gradients"):
            self._sums[parameter].add_(gradient.to("cpu"))

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        return self._sums[parameter]

    def clear(self) -> None:
        """Begins anew."""
        for total in self._sums.values():
            total.zero_()
