"""Bytes of live tensor storages, counted as they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageLedger(TorchDispatchMode):
    """While active, counts the storages that operations create, until they are freed.

    ``live`` and ``peak`` are bytes above what was alive on entry. Storages are what a backward pass keeps: a tensor
    saved for backward stays in the count for as long as its graph lives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def exclude(self, *tensors: Tensor) -> None:
        """Storages that were there before: operations may return views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage, self._forget(storage._cdata, 0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if size == 0 or address in self._known:
            return
        self._known[address] = weakref.ref(storage, self._forget(address, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            del self._known[address]
            self.live -= size

        return forget
