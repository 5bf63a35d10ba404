"""The base model's weights, kept in host memory while others are trained, and lent to the model for a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from leapalign.memory.exchange import exchanged
from leapalign.memory.residency import host_memory
from leapalign.memory.transfer import pinned


class BaseWeights:
    """A copy of ``parameters`` as they are now, in host memory and in their dtypes.

    It changes places with what the parameters hold later, one after the other, so that the device never holds more of
    the two than one parameter twice.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._parameters = parameters
        with torch.no_grad(), host_memory("weights"):
            self._held = [pinned(p.numel(), p.detach(), device).view(p.shape) for p in parameters]
            for held, parameter in zip(self._held, parameters, strict=True):
                held.copy_(parameter)

    def lent(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the parameters hold the copy; after it, to the bit, what they held before."""
        return exchanged(self._parameters, self._held)
