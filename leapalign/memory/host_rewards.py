"""Rewards whose weights live in host memory, and are on the device while they score."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from leapalign.memory.residency import host_memory, made_for, note_traffic
from leapalign.memory.transfer import pinned


class HostReward:
    """Moves the weights of ``reward``, which nobody changes, to host memory, pinned for ``device``; its buffers to
    ``device``. Raises UserError where the system does not allow so much of it."""

    def __init__(self, reward: nn.Module, device: torch.device) -> None:
        self._device = device
        self._held: list[tuple[nn.Parameter, torch.Tensor]] = []
        for parameter in reward.parameters():
            with host_memory("reward"):
                home = pinned(parameter.numel(), parameter.detach(), device).view(parameter.shape)
                home.copy_(parameter.detach())
            parameter.data = home
            self._held.append((parameter, home))
        for buffer in reward.buffers():
            buffer.data = buffer.data.to(device)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block the weights are on the device. After it nothing may refer to them there: no graph."""
        with made_for("reward"):
            for parameter, home in self._held:
                there = torch.empty_like(home, device=self._device)
                parameter.data = there.copy_(home, non_blocking=True)
                note_traffic("to_device", home.nbytes)
        try:
            yield
        finally:
            for parameter, home in self._held:
                parameter.data = home
