"""Bytes of live tensor storages, counted as they come and go: on real tensors and on fake ones alike."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from leapalign.memory.residency import HOST, ROLE, STAGE, Role, Stage
from leapalign.planning.caching_allocator import Event
from leapalign.planning.quantized import is_product, product


@dataclass
class Peak:
    """The most bytes alive at a time, and whose they were at that moment."""

    total: int = 0
    by_role: dict[Role, int] = field(default_factory=dict)


@dataclass
class _Side:
    """One memory: the device's, or the host's."""

    live: dict[Role, int] = field(default_factory=dict)
    total: int = 0
    peaks: dict[Stage, Peak] = field(default_factory=dict)


@dataclass
class _Known:
    storage: weakref.ref[torch.UntypedStorage]
    size: int
    side: _Side
    role: Role
    number: int


class StorageLedger(TorchDispatchMode):
    """While active, counts the storages that operations create, until they are freed.

    ``live`` and ``peak`` are bytes of device memory above what was alive on entry. Storages are what a backward pass
    keeps: a tensor saved for backward stays in the count for as long as its graph lives. Host memory is what is made
    within `leapalign.memory.residency.host_memory`; roles and stages come from there, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device, self.host = _Side(), _Side()
        self.events: list[Event] = []
        """Storages on the device, as they came and went, since `begin_events`."""
        self._recording = False
        self._known: dict[int, _Known] = {}
        self._numbers = itertools.count()

    @property
    def live(self) -> int:
        return self.device.total

    @property
    def peak(self) -> int:
        return max((peak.total for peak in self.device.peaks.values()), default=0)

    def in_host_memory(self, tensor: Tensor) -> bool:
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known is not None and known.side is self.host

    def exclude(self, *tensors: Tensor) -> None:
        """Storages that are not counted, or no more: operations may return views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._leave(storage._cdata)
            self._enter(storage, 0, self.device, ROLE.get())

    def count(self, *tensors: Tensor, role: Role, host: bool = False) -> None:
        """Counts tensors as ``role``, whatever they were counted as."""
        side = self.host if host else self.device
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._known.get(storage._cdata)
            if known is not None and known.side is side and known.size == storage.nbytes():
                self._add(side, known.role, -known.size)
                known.role = role
                self._add(side, role, known.size)
                continue
            self._leave(storage._cdata)
            self._enter(storage, storage.nbytes(), side, role)

    def count_gradient(self, parameter: Tensor) -> None:
        """Counts the gradient of ``parameter``, if it has one, which was just added to.

        Fake tensors' sum is a new one, that of real tensors is in place; in ``events`` it is so for both.
        """
        gradient = parameter.grad
        if gradient is None:
            return
        self.count(gradient, role="gradients")
        known = self._known[gradient.untyped_storage()._cdata]
        if len(self.events) > 1 and self.events[-2] == (known.number, known.size) and self.events[-1][1] == 0:
            del self.events[-2]
            known.number, _ = self.events.pop()

    def peak_of(self, run: Callable[[], Any]) -> tuple[Any, dict[Role, int]]:
        """Returns what ``run()`` does, and how much device memory it held at its peak beyond what was alive."""
        peaks, name = self.device.peaks, STAGE.get()
        before, alive = peaks.pop(name, Peak()), dict(self.device.live)
        result = run()
        reached = peaks.get(name, Peak())
        more = {role: size - alive.get(role, 0) for role, size in reached.by_role.items()}
        if reached.total < before.total:
            peaks[name] = before
        return result, more

    def reach(self, more: dict[Role, int]) -> None:
        """Notes a peak as if ``more`` were alive than is."""
        by_role = {role: self.device.live.get(role, 0) + more.get(role, 0) for role in {*self.device.live, *more}}
        peak, total = self.device.peaks.setdefault(STAGE.get(), Peak()), sum(by_role.values())
        if total > peak.total:
            peak.total, peak.by_role = total, {role: size for role, size in by_role.items() if size}

    def begin_events(self) -> None:
        """Has ``events`` begin with what is alive."""
        self._recording = True
        self.events = [(one.number, one.size) for one in self._known.values() if one.size and one.side is self.device]

    def happen_again(self, events: Iterable[Event]) -> None:
        """Notes ``events`` once more, of storages of their own, which are then all gone."""
        numbers: dict[int, int] = {}
        for storage, size in events:
            if size:
                numbers[storage] = next(self._numbers)
                self.events.append((numbers[storage], size))
            elif storage in numbers:
                self.events.append((numbers.pop(storage), 0))
        self.events += [(number, 0) for number in numbers.values()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for side in (self.device, self.host):
            # A stage that makes nothing of its own still holds what was alive when it began.
            if side.total and STAGE.get() not in side.peaks:
                self._add(side, ROLE.get(), 0)
        if is_product(func):
            with self:
                return product(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage.nbytes() and storage._cdata not in self._known:
                    side = self.host if HOST.get() else self.device
                    self._enter(storage, storage.nbytes(), side, ROLE.get())
        return result

    def _enter(self, storage: torch.UntypedStorage, size: int, side: _Side, role: Role) -> None:
        address = storage._cdata
        known = _Known(weakref.ref(storage, self._forget(address)), size, side, role, next(self._numbers))
        self._known[address] = known
        self._add(side, role, size)
        if self._recording and size and side is self.device:
            self.events.append((known.number, size))

    def _leave(self, address: int) -> None:
        known = self._known.pop(address, None)
        if known is None:
            return
        self._add(known.side, known.role, -known.size)
        if self._recording and known.size and known.side is self.device:
            self.events.append((known.number, 0))

    def _forget(self, address: int) -> Callable[[Any], None]:
        def forget(gone: Any) -> None:
            known = self._known.get(address)
            # The address may be another storage's by now.
            if known is not None and known.storage is gone:
                self._leave(address)

        return forget

    def _add(self, side: _Side, role: Role, size: int) -> None:
        side.live[role] = side.live.get(role, 0) + size
        side.total += size
        peak = side.peaks.setdefault(STAGE.get(), Peak())
        if side.total > peak.total:
            peak.total, peak.by_role = side.total, {role: size for role, size in side.live.items() if size}
