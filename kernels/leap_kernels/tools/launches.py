"""Records what an op's launcher launches on a GPU that is not here: all of it is real but the launch itself.

Triton's runtime binds the arguments, chooses the version of the kernel that they ask for, and compiles it for the
target; then a driver that has no GPU notes the launch. Tensors are PyTorch's on the device `meta`: they have a size and
an address, which begins at 0, and no memory. For a process of its own: it could launch nothing afterwards, and needs
Triton as a compiler, not as an interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .gpus import TARGETS, Target


@dataclass(frozen=True)
class Inputs:
    """The size of an op's tensors, which begin `offset` elements after an address that divides by 16."""

    batch: int
    per_sample: int
    dtype: torch.dtype
    offset: int = 0

    @property
    def count(self) -> int:
        """The elements of the latents."""
        return self.batch * self.per_sample

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of any shape."""
        size = torch.Size(shape).numel()
        return torch.empty(self.offset + size, dtype=dtype, device="meta")[self.offset :].view(*shape)

    def latents(self, count: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return tensors (batch, per_sample)."""
        return [self.tensor((self.batch, self.per_sample), dtype or self.dtype) for _ in range(count)]

    def numbers(self, count: int) -> list[Tensor]:
        """Return float32 tensors (batch,)."""
        return [self.tensor((self.batch,), torch.float32) for _ in range(count)]

    def flat(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of as many elements as the latents."""
        return self.tensor((self.count,), dtype or self.dtype)


Launcher = Callable[[Inputs], Callable[[], object]]
"""Makes an op's tensors, and returns a function that launches it on them."""


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel."""

    kernel: Any
    """The function that `triton.jit` decorated."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By name, constants included."""
    compiled: Any
    """What Triton compiled for these arguments."""

    @property
    def signature(self) -> dict[str, str]:
        """The type that Triton gave each argument; `constexpr` where it compiled the value in."""
        return dict(self.compiled.src.signature)

    @property
    def parameters(self) -> dict[str, Any]:
        """The arguments that are not compiled in, which the machine code takes in this order."""
        return {name: self.arguments[name] for name, kind in self.signature.items() if kind != "constexpr"}

    @property
    def constexprs(self) -> dict[str, Any]:
        """The arguments that the kernel wants as constants."""
        return {param.name: self.arguments[param.name] for param in self.kernel.params if param.is_constexpr}

    @property
    def programs(self) -> int:
        """How many programs run."""
        return torch.Size(self.grid).numel()


@dataclass
class Recorded:
    """What a launcher did."""

    launches: list[Launch] = field(default_factory=list)
    torch_bytes: int = 0
    """Bytes that PyTorch's operations beside the launches read and write, each tensor of each once."""


def recorded(launcher: Launcher, inputs: Inputs, target: Target) -> Recorded:
    """Return what `launcher` does for tensors of a size, on a GPU of the kind `target`."""
    launch = launcher(inputs)
    done = Recorded()
    with _noting(done, target), _Traffic(done):
        launch()
    return done


@contextlib.contextmanager
def _noting(done: Recorded, target: Target) -> Iterator[None]:
    runtime = importlib.import_module("triton.runtime")
    driver, jit = _Driver(target), importlib.import_module("triton.runtime.jit").JITFunction
    runtime.driver.set_active(driver)
    run = jit.run

    def noted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        compiled = run(kernel, *arguments, **options)
        grid, values = driver.launched.pop()
        bound = dict(zip(kernel.arg_names, values, strict=True))
        done.launches.append(Launch(kernel, grid, bound, compiled))
        return compiled

    jit.run = noted
    try:
        yield
    finally:
        jit.run = run


class _Driver:
    """Stands where Triton's runtime expects the driver of the GPU; its devices are the targets."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = self
        self.launched: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def get_current_target(self) -> Any:
        compiler = importlib.import_module("triton.backends.compiler")
        return compiler.GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device.
        return TARGETS.index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        core = TARGETS[device].core
        return {"max_shared_mem": core.shared_bytes - core.reserved_shared}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return a module, a function, its registers and spills, and the most threads of a program."""
        return binary, name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            # Before the arguments: stream, function, two kinds of metadata, two hooks.
            _active().launched.append(((x, y, z), rest[6:]))

        return launch


def _active() -> _Driver:
    driver: _Driver = importlib.import_module("triton.runtime").driver.active
    return driver


class _Traffic(TorchDispatchMode):
    """Counts the bytes that PyTorch's operations move: views and memory not yet written count nothing."""

    def __init__(self, done: Recorded) -> None:
        super().__init__()
        self.done = done

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        aliases = [returned.alias_info for returned in op._schema.returns]
        views = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not views and not op._schema.name.startswith(("aten::empty", "aten::new_empty")):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.done.torch_bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return result
