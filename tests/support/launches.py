"""Counts what a GPU would be given to do, in a run on the CPU: kernels of Triton and PyTorch, and reads by the host."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from leap_kernels import _library
from leap_kernels._catalog import OPS
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATIONS = ("aten::empty", "aten::new_empty")
# On a GPU PyTorch joins 128 tensors a kernel, and repeats with a sum and a kernel, each of which may take two.
_JOINED_AT_ONCE = 128
_KERNELS_OF_A_REPEAT = 4


class Launches(TorchDispatchMode):
    """What happened by name, in the sections that `section` names; "" outside of them.

    An operation of PyTorch counts as one kernel unless it only views, allocates or is known to take more. Those on
    ``host`` tensors alone do not count. All others do, so that the small tables that are made on the host make the
    count too large, if anything.
    """

    def __init__(self, host: list[torch.Tensor]) -> None:
        super().__init__()
        self.counted: dict[str, Counter[str]] = {}
        self._host = {tensor.data_ptr() for tensor in host}
        self._section, self._in_kernel = "", False

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What happens in the block counts under the name."""
        before, self._section = self._section, name
        try:
            yield
        finally:
            self._section = before

    def add(self, name: str, kernels: int = 1) -> None:
        self.counted.setdefault(self._section, Counter())[name] += kernels

    def kernels(self, section: str = "") -> int:
        """All but what the host reads."""
        return self.counted.get(section, Counter()).total() - self.reads(section)

    def reads(self, section: str = "") -> int:
        """Numbers that the host has waited for."""
        return self.counted.get(section, Counter())["aten::_local_scalar_dense"]

    @contextlib.contextmanager
    def kernel(self, name: str) -> Iterator[None]:
        """The interpreter computes with PyTorch, too."""
        self.add(name)
        self._in_kernel = True
        try:
            yield
        finally:
            self._in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if not (self._in_kernel or func.is_view or name.startswith(_ALLOCATIONS) or self._on_the_host(args)):
            joined = -(-len(args[0]) // _JOINED_AT_ONCE) if name in ("aten::cat", "aten::stack") else 1
            self.add(name, _KERNELS_OF_A_REPEAT if name == "aten::repeat_interleave" else joined)
        return func(*args, **(kwargs or {}))

    def _on_the_host(self, args: tuple[Any, ...]) -> bool:
        tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
        return bool(tensors) and all(tensor.data_ptr() in self._host for tensor in tensors)


class _Counted:
    """A Triton kernel whose launches count."""

    def __init__(self, kernel: Any, launches: Launches) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            with self._launches.kernel(self._kernel.fn.__name__):
                self._kernel[grid](*arguments, **options)

        return launch


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, host: list[torch.Tensor]) -> Iterator[Launches]:
    """Within the block, counts."""
    launches = Launches(host)
    for kernel in {id(spec.kernel): spec.kernel for op in OPS for spec in op.kernels}.values():
        module = sys.modules[kernel.fn.__module__]
        monkeypatch.setattr(module, kernel.fn.__name__, _Counted(kernel, launches))
    # Or PyTorch would see our ops instead of what they are made of.
    monkeypatch.setattr(_library, "_observed", lambda arguments: False)
    with launches:
        yield launches
