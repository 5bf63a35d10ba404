"""Weights whose masters live in host memory: the device holds copies of all of them, or of a few blocks at a time.

The copies run on a stream of their own where the device is a GPU; this file holds every line that has to know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.memory.residency import host_memory, made_for, note_traffic
from leapalign.validation import UserError


@dataclass(eq=False)
class _Buffer:
    """Device memory for one group's copy."""

    memory: Tensor
    owner: _Group | None = None
    arrived: Any = None
    """Event after which the copy can be used."""


@dataclass(eq=False)
class _Group:
    """Parameters that move together: a block's, or those outside all blocks."""

    parameters: list[nn.Parameter]
    master: Tensor
    """All of them, flat, in host memory."""
    buffer: _Buffer | None = None

    def point_at(self, flat: Tensor) -> None:
        """Makes the parameters views of ``flat``."""
        begin = 0
        for parameter in self.parameters:
            parameter.data = flat[begin : begin + parameter.numel()].view(parameter.shape)
            begin += parameter.numel()


class HostWeights:
    """Moves the weights of ``model`` to host memory and keeps device copies up to date.

    buffers: device copies of so many blocks, filled in the order of use, one ahead; blocks must then be recomputed in
        the backward pass, which finds them in reverse order. None: copies of all blocks.

    Blocks are the members of the model's module lists. Raises UserError for parameters of several dtypes, or shared
    between blocks.
    """

    def __init__(self, model: nn.Module, device: torch.device, buffers: int | None) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
        blocks = [block for members in lists for block in members]
        inside = {parameter for block in blocks for parameter in block.parameters()}
        outside = [parameter for parameter in model.parameters() if parameter not in inside]
        if len({parameter.dtype for parameter in model.parameters()}) > 1:
            raise UserError("weights of several dtypes cannot be held in host memory; set memory.optimizer to device")
        if sum(len(list(block.parameters())) for block in blocks) != len(inside):
            raise UserError("blocks that share weights cannot be held in host memory; set memory.optimizer to device")
        self._blocks = [self._hosted(list(block.parameters())) for block in blocks]
        self._rest = self._hosted(outside)
        largest = max((group.master.numel() for group in self._blocks), default=0)
        sizes = [group.master.numel() for group in self._blocks] if buffers is None else [largest] * buffers
        with made_for("weights"):
            self._ring = [_Buffer(self._rest.master.new_empty(size, device=device)) for size in sizes]
            self._rest.buffer = _Buffer(torch.empty_like(self._rest.master, device=device))
        if buffers is not None:
            for number, block in enumerate(blocks):
                block.register_forward_pre_hook(self._before(number))
        self._streamed = buffers is not None
        self._refresh()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Within the block the parameters are the masters; the device copies follow at its end."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()
        for buffer in self._ring:
            self._give_back(buffer)
        self._rest.point_at(self._rest.master)
        try:
            yield
        finally:
            self._refresh()

    def _hosted(self, parameters: list[nn.Parameter]) -> _Group:
        """A group with its master made; the parameters are views of it from now on."""
        with torch.no_grad(), host_memory("weights"):
            flat = torch.cat([parameter.detach().to("cpu").flatten() for parameter in parameters])
            if self._stream is not None:
                flat = flat.pin_memory()
        group = _Group(parameters, flat)
        group.point_at(flat)
        return group

    def _refresh(self) -> None:
        """Copies what always is on the device anew."""
        assert self._rest.buffer is not None
        self._copy(self._rest, self._rest.buffer)
        self._await(self._rest.buffer)
        if not self._streamed:
            for group, buffer in zip(self._blocks, self._ring, strict=True):
                self._copy(group, buffer)
                self._await(buffer)

    def _before(self, number: int) -> Any:
        def load(*_: Any) -> None:
            self._load(number)
            buffer = self._blocks[number].buffer
            assert buffer is not None
            self._await(buffer)
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

    @torch.no_grad()
    def _copy(self, group: _Group, buffer: _Buffer) -> None:
        """Fills ``buffer`` with the group's weights; on a GPU after the work that still reads it, beside later work."""
        note_traffic("to_device", group.master.nbytes)
        memory = buffer.memory[: group.master.numel()]
        if self._stream is None:
            memory.copy_(group.master)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                memory.copy_(group.master, non_blocking=True)
                buffer.arrived = self._stream.record_event()
        group.buffer, buffer.owner = buffer, group
        group.point_at(memory)

    def _await(self, buffer: _Buffer) -> None:
        if buffer.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(buffer.arrived)
