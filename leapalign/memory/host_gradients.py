"""Gradients that leave the device the moment they are complete, and add up in host memory, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from leap_kernels import accumulate_
from torch import Tensor, nn

from leapalign.memory.residency import host_memory, note_host_work, note_traffic
from leapalign.memory.transfer import ToHost


class HostGradients:
    """Sums of gradients: exact accumulation, and all of them there before the first weight moves.

    Gradients come from ``device``, in the dtype of the parameters. A GPU's backward pass goes on while they are copied
    and added, each parameter's in the order they came.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        with host_memory("gradients"):
            self._sums: dict[Tensor, Tensor] = {
                p: torch.zeros_like(p, dtype=torch.float32, device="cpu") for p in parameters
            }
            self._to_host = ToHost(device, parameters)
        self._given: set[Tensor] = set()

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """A `leapalign.surrogate.GradientSink`. Raises what adding an earlier gradient raised."""
        note_traffic("to_host", gradient.nbytes)
        note_host_work(2 * self._sums[parameter].nbytes + gradient.nbytes)
        self._given.add(parameter)
        self._to_host.send(gradient, partial(accumulate_, self._sums[parameter]))

    def wait(self) -> None:
        """Returns when the sums are complete; raises what adding a gradient raised."""
        self._to_host.wait()

    def __getitem__(self, parameter: nn.Parameter) -> Tensor | None:
        """The sum, shape of the parameter, float32; complete after `wait`. None where there was no gradient."""
        return self._sums[parameter] if parameter in self._given else None

    def clear(self) -> None:
        """Begins anew."""
        for parameter in self._given:
            self._sums[parameter].zero_()
            note_host_work(self._sums[parameter].nbytes)
        self._given.clear()
