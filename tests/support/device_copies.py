"""Counts what has the host wait for a device, on a machine without one: host tensors are on the CPU, the device's on
"meta", where nothing is computed."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

AWAY = torch.device("meta")
"""Stands for the device."""
_BUILDERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor}
"""Make a tensor of values that the host has."""
_aten = torch.ops.aten
_SIZED_BY_VALUES = {
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.repeat_interleave,
    _aten.bincount,
    _aten.equal,
    _aten.is_nonzero,
}
"""Of their result the host has to know more than the shapes of their arguments say."""


class DeviceCopies(TorchDispatchMode):
    """Within the block, ``copies`` counts copies from the host, and ``waits`` what the host has to know of values.

    Both by the function that asked, ``file:function``. Tensors that the host copies are full of
    zeros, and numbers that it asks for are 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._built = _Built(self.copies)

    def __enter__(self) -> DeviceCopies:
        self._built.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._built.__exit__(*error)

    @property
    def all(self) -> Counter[str]:
        return self.copies + self.waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = [tensor for tensor in tensors if tensor.device == AWAY]
        to = kwargs.get("device")
        if packet is _aten._to_copy:
            if away and to is not None and torch.device(to).type == "cpu":
                self.waits[_asker()] += 1
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if not away and to is not None and torch.device(to) == AWAY:
                self.copies[_asker()] += 1
        elif packet is _aten.copy_:
            if away and args[0].device != AWAY:
                self.waits[_asker()] += 1
                return args[0].zero_()
            if args[0].device == AWAY and args[1].device != AWAY:
                self.copies[_asker()] += 1
        elif packet is _aten._local_scalar_dense and away:
            self.waits[_asker()] += 1
            return 1.0 if args[0].is_floating_point() else True if args[0].dtype == torch.bool else 1
        elif away:
            if packet in _SIZED_BY_VALUES or (packet in (_aten.index, _aten.index_put_) and _by_mask(args[1])):
                self.waits[_asker()] += 1
            # Of an elementwise operation a number on the host is an argument of the kernel.
            numbers_are_free = torch.Tag.pointwise in func.tags and packet is not _aten.where
            here = [t for t in tensors if t.device != AWAY and not (numbers_are_free and t.dim() == 0)]
            if here:
                self.copies[_asker()] += len(here)
        return func(*args, **kwargs)


class _Built(TorchFunctionMode):
    """Counts tensors that are built on the device of what the host has: no operation shows them."""

    def __init__(self, copies: Counter[str]) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == AWAY:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            self._copies.update([_asker()] * sum(isinstance(place, (list, np.ndarray)) for place in places))
        result = func(*args, **(kwargs or {}))
        known = func is torch.as_tensor and isinstance(args[0], Tensor)
        if func in _BUILDERS and result.device == AWAY and not known:
            self._copies[_asker()] += 1
        return result


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool and index.device == AWAY for index in indices)


def _asker() -> str:
    """The innermost function outside of PyTorch and of this file."""
    frame = sys._getframe(1)
    own, torchs = __file__, str(Path(torch.__file__).parent)
    while frame.f_back is not None and (frame.f_code.co_filename == own or frame.f_code.co_filename.startswith(torchs)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
