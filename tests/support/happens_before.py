"""Vector clocks for threads, the device's own stream and copy lanes: no schedule is tried, every unordered conflicting
pair of accesses is a race.

A function on the background runs at once, and its clock says that nobody waited for it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from leapalign.memory import base_weights, host_weights, transfer
from leapalign.memory.residency import HOST


class VectorClock(Counter[str]):
    """How much of each agent's work has happened before."""

    def join(self, other: VectorClock) -> None:
        for name, time in other.items():
            self[name] = max(self[name], time)


class Agent:
    """What works in an order of its own."""

    def __init__(self, name: str) -> None:
        self.name, self.clock = name, VectorClock()
        self.tick()

    def tick(self) -> None:
        self.clock[self.name] += 1


@dataclass(frozen=True)
class _Access:
    writes: bool
    name: str
    time: int
    start: int
    end: int
    op: str


class World:
    """What a run did: ``races`` in words, and how many ``accesses`` each kind of agent made in ``ops``."""

    def __init__(self) -> None:
        self.host, self.own = Agent("host thread"), Agent("own stream")
        self.thread, self.lane = self.host, None
        self.lanes = self.backgrounds = self.ops = 0
        self.races: Counter[str] = Counter()
        self.accesses: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.in_host_memory: set[int] = set()
        self.recorded: set[int] = set()
        self.holders: dict[int, VectorClock] = {}
        self._history: dict[int, list[_Access]] = {}
        self.on = True

    thread: Agent
    lane: Agent | None

    def access(self, agent: Agent, tensor: Tensor, writes: bool, op: str) -> None:
        if tensor.numel() == 0 or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._history:
            self._history[key] = []
            weakref.finalize(storage, self._freed, key).atexit = False
        size = tensor.element_size()
        start = tensor.storage_offset() * size
        extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        end = start + (1 + extent) * size
        kept = []
        for old in self._history[key]:
            overlaps = start < old.end and old.start < end
            if overlaps and (writes or old.writes) and agent.clock[old.name] < old.time:
                self.races[f"{old.op} on {old.name} / {op} on {agent.name}"] += 1
            covered = old.name == agent.name and start <= old.start and old.end <= end
            if not (covered and (writes or not old.writes)):
                kept.append(old)
        self._history[key] = [*kept, _Access(writes, agent.name, agent.clock[agent.name], start, end, op)]
        self.accesses[agent.name.rstrip("0123456789 ")] += 1
        if writes:
            self.written[op] += 1

    def _freed(self, key: int) -> None:
        history, held = self._history.pop(key, []), self.holders.pop(key, None)
        hosted, recorded = key in self.in_host_memory, key in self.recorded
        self.in_host_memory.discard(key)
        self.recorded.discard(key)
        if not self.on or recorded:
            return
        # Who drops the last reference comes after the others that held one.
        seen = VectorClock(self.thread.clock)
        seen.join(held or VectorClock())
        if not hosted:
            # The allocator gives device memory to later work of the own stream.
            seen.join(self.own.clock)
        for old in history:
            if old.name not in (self.own.name, self.host.name) and seen[old.name] < old.time:
                self.races[f"{old.op} on {old.name} / freed"] += 1

    def at_work(self, tensors: list[Tensor], op: str) -> Agent:
        """Who runs an op on ``tensors``, its clock moved on."""
        hosted = [t.untyped_storage()._cdata in self.in_host_memory for t in tensors]
        if self.lane is not None:
            agent = self.lane
        elif self.thread is not self.host or any(hosted):
            agent = self.thread
            if not all(hosted):
                # A copy that is not asked of a lane is waited for.
                agent.clock.join(self.own.clock)
        else:
            agent = self.own
        agent.clock.join(self.thread.clock)
        agent.tick()
        if op.startswith(("_local_scalar", "nonzero")):
            self.thread.clock.join(agent.clock)
        return agent


class _Watch(TorchDispatchMode):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, world = kwargs or {}, self.world
        out = func(*args, **kwargs)
        world.ops += 1
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in inputs}
        made = [t for t in tree_iter(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known]
        if HOST.get() or world.thread is not world.host:
            world.in_host_memory.update(t.untyped_storage()._cdata for t in made)
        op, names, changed, aliased = _schema_of(func)
        named = dict(zip(names, args, strict=False)) | kwargs if changed else {}
        written = [t for name in changed for t in tree_iter(named.get(name)) if isinstance(t, Tensor)]
        view = not written and aliased
        if view or op in ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view"):
            return out
        agent = world.at_work(inputs + made, op)
        for tensor in [] if op in ("zeros_like", "ones_like", "full_like", "new_zeros") else inputs:
            if op != "copy_" or not any(tensor is t for t in written):
                world.access(agent, tensor, False, op)
        for tensor in written + made:
            world.access(agent, tensor, True, op)
        return out


@functools.cache
def _schema_of(func: Any) -> tuple[str, list[str], list[str], bool]:
    """An op's name, its arguments, those that it writes into, and whether it returns a view."""
    schema = func._schema
    changed = [s.name for s in schema.arguments if s.alias_info and s.alias_info.is_write]
    aliased = any(r.alias_info for r in schema.returns)
    return func.__name__.split(".")[0], [s.name for s in schema.arguments], changed, aliased


def _streams(world: World) -> Any:
    class Stream:
        def __init__(self, *_: Any) -> None:
            world.lanes += 1
            self.agent = Agent(f"lane {world.lanes}")

        def wait_event(self, event: Event) -> None:
            self.agent.clock.join(world.thread.clock)
            self.agent.clock.join(event.clock)

    class Event:
        def __init__(self) -> None:
            self.clock = VectorClock()

        def record(self, stream: Stream) -> None:
            stream.agent.clock.join(world.thread.clock)
            self.clock = VectorClock(stream.agent.clock)
            stream.agent.tick()

        def synchronize(self) -> None:
            world.thread.clock.join(self.clock)

    own = Stream.__new__(Stream)
    own.agent = world.own

    @contextlib.contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        before, world.lane = world.lane, stream.agent
        try:
            yield
        finally:
            world.lane = before

    return SimpleNamespace(Stream=Stream, Event=Event, current_stream=lambda device=None: own, stream=stream)


@dataclass
class Done:
    """What a caller may wait for: a function on the background."""

    world: World
    clock: VectorClock

    def result(self) -> None:
        self.world.thread.clock.join(self.clock)


def _background(world: World) -> Any:
    class Background:
        def __init__(self, threaded: bool) -> None:
            world.backgrounds += 1
            self.agent = Agent(f"background {world.backgrounds}")

        def run(self, function: Callable[..., None], *arguments: Any) -> Done:
            before, world.thread = world.thread, self.agent
            self.agent.clock.join(before.clock)
            before.tick()
            try:
                function(*arguments)
            finally:
                world.thread = before
            clock = VectorClock(self.agent.clock)
            for tensor in arguments:
                if isinstance(tensor, Tensor):
                    world.holders.setdefault(tensor.untyped_storage()._cdata, VectorClock()).join(clock)
            self.agent.tick()
            return Done(world, clock)

    return Background


@contextlib.contextmanager
def watched() -> Iterator[World]:
    """Notes who reads, writes and frees what within the block, as if the device were a GPU."""
    world = World()
    pinned, device_memory = transfer.pinned, transfer.Lane.device_memory

    def noted(*arguments: Any) -> Tensor:
        memory = pinned(*arguments)
        world.in_host_memory.add(memory.untyped_storage()._cdata)
        return memory

    def reused(lane: transfer.Lane, count: int, like: Tensor) -> Tensor:
        memory = device_memory(lane, count, like)
        world.recorded.add(memory.untyped_storage()._cdata)
        # What had it before was work of the own stream.
        world.access(world.at_work([memory], "before"), memory, True, "before")
        return memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_device_module", lambda device=None: _modules)
        _modules = _streams(world)
        patch.setattr(transfer, "Background", _background(world))
        for module in (transfer, host_weights, base_weights):
            patch.setattr(module, "pinned", noted)
        patch.setattr(transfer.Lane, "device_memory", reused)
        try:
            with _Watch(world):
                yield world
        finally:
            world.on = False


def drop(patch: pytest.MonkeyPatch, owner: Any, method: str, caller: str, instead: Callable[[], Any]) -> None:
    """Has calls of ``method`` from a function named ``caller`` do and return ``instead``."""
    real = getattr(owner, method)

    def call(*arguments: Any, **named: Any) -> Any:
        return instead() if sys._getframe(1).f_code.co_name == caller else real(*arguments, **named)

    patch.setattr(owner, method, call)
