"""Weights whose masters live in host memory: the device holds copies of all of them, or of a few blocks at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.inputs.validation import UserError
from leapalign.memory.residency import host_memory, made_for, note_traffic
from leapalign.memory.transfer import Event, Lane, pinned


@dataclass(eq=False)
class _Buffer:
    """Device memory for one group's copy."""

    memory: Tensor
    read: Event
    """The point after which nothing reads what is in it: a new copy may begin."""
    arrived: Event = None
    """The point at which the copy can be used."""
    owner: _Group | None = None


@dataclass(eq=False)
class _Group:
    """Parameters that move together: a block's, or those outside all blocks."""

    parameters: list[nn.Parameter]
    master: Tensor
    """All of them, flat, in host memory."""
    buffer: _Buffer | None = None

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' shares of ``flat``, in their shapes."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]

    def point_at(self, flat: Tensor) -> None:
        """Makes the parameters views of ``flat``."""
        for parameter, part in zip(self.parameters, self.views(flat), strict=True):
            parameter.data = part


class HostWeights:
    """Moves the weights of ``model`` to host memory and keeps device copies up to date.

    buffers: device copies of so many blocks, filled in the order of use, one ahead; blocks must then be recomputed in
        the backward pass, which finds them in reverse order. None: copies of all blocks.

    Where some weights are frozen, only these move. Blocks are the members of the model's module lists. Raises UserError
    for parameters of several dtypes, or shared between blocks.
    """

    def __init__(self, model: nn.Module, device: torch.device, buffers: int | None) -> None:
        self.device = device
        """Where the copies are."""
        self._lane = Lane(device)
        lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
        blocks = [block for members in lists for block in members]
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        held = dict.fromkeys(frozen or model.parameters())
        for parameter in model.parameters():
            if parameter not in held:
                parameter.data = parameter.data.to(device)
        of_blocks = [[parameter for parameter in block.parameters() if parameter in held] for block in blocks]
        inside = {parameter for parameters in of_blocks for parameter in parameters}
        outside = [parameter for parameter in held if parameter not in inside]
        if len({parameter.dtype for parameter in held}) > 1:
            raise UserError("weights of several dtypes cannot be held in host memory; set memory.optimizer to device")
        if sum(map(len, of_blocks)) != len(inside):
            raise UserError("blocks that share weights cannot be held in host memory; set memory.optimizer to device")
        self._blocks = [self._hosted(parameters) for parameters in of_blocks]
        self._rest = self._hosted(outside)
        largest = max((group.master.numel() for group in self._blocks), default=0)
        sizes = [group.master.numel() for group in self._blocks] if buffers is None else [largest] * buffers
        with made_for("weights"):
            self._ring = [self._buffer(size) for size in sizes]
            self._rest.buffer = self._buffer(self._rest.master.numel())
        self._running: _Buffer | None = None
        if buffers is not None:
            for number, block in enumerate(blocks):
                block.register_forward_pre_hook(self._before(number))
        self._streamed = buffers is not None
        self._refresh()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Within the block the parameters are the masters; the device copies follow at its end."""
        # A copy that nobody needed yet may still read the masters.
        self._lane.finish()
        for buffer in self._ring:
            self._give_back(buffer)
        self._rest.point_at(self._rest.master)
        try:
            yield
        finally:
            self._refresh()

    def _hosted(self, parameters: list[nn.Parameter]) -> _Group:
        """A group with its master made; the parameters are views of it from now on."""
        count = sum(parameter.numel() for parameter in parameters)
        with torch.no_grad(), host_memory("weights"):
            group = _Group(parameters, pinned(count, parameters[0].detach(), self.device))
            for parameter, part in zip(parameters, group.views(group.master), strict=True):
                part.copy_(parameter)
        group.point_at(group.master)
        return group

    def _buffer(self, size: int) -> _Buffer:
        return _Buffer(self._lane.device_memory(size, like=self._rest.master), read=self._lane.mark())

    def _refresh(self) -> None:
        """Copies what always is on the device anew."""
        groups = [self._rest] if self._streamed else [self._rest, *self._blocks]
        buffers = [self._rest.buffer] if self._streamed else [self._rest.buffer, *self._ring]
        for group, buffer in zip(groups, buffers, strict=True):
            assert buffer is not None
            buffer.read = self._lane.mark()
            self._copy(group, buffer)
            self._lane.need(buffer.arrived)

    def _before(self, number: int) -> Any:
        def load(*_: Any) -> None:
            # Blocks run one after the other, forwards and backwards: the device has been given all of the last one.
            if self._running is not None:
                self._running.read = self._lane.mark()
            self._load(number)
            self._running = self._blocks[number].buffer
            assert self._running is not None
            self._lane.need(self._running.arrived)
            # In a backward pass blocks are recomputed last first. A rollout's next step begins with the first.
            backward = torch._C._current_graph_task_id() != -1
            following = number - 1 if backward else (number + 1) % len(self._blocks)
            if following >= 0:
                self._load(following)

        return load

    def _load(self, number: int) -> None:
        """Starts a block's copy, in place of the one that was used longest ago."""
        group = self._blocks[number]
        buffer = group.buffer or self._ring[0]
        self._ring.remove(buffer)
        self._ring.append(buffer)
        if group.buffer is None:
            self._give_back(buffer)
            self._copy(group, buffer)

    def _give_back(self, buffer: _Buffer) -> None:
        if buffer.owner is not None:
            buffer.owner.point_at(buffer.owner.master)
            buffer.owner.buffer = None
            buffer.owner = None

    def _copy(self, group: _Group, buffer: _Buffer) -> None:
        """Fills ``buffer`` with the group's weights, once nothing reads it any more, beside other work."""
        note_traffic("to_device", group.master.nbytes)
        memory = buffer.memory[: group.master.numel()]
        buffer.arrived = self._lane.copy(memory, group.master, after=buffer.read)
        group.buffer, buffer.owner = buffer, group
        group.point_at(memory)
