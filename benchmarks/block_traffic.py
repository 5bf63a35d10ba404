"""What FLUX.1-dev's blocks move and save: diffusers' code, what Inductor makes of it, and patched.

    python -m benchmarks.block_traffic > benchmarks/results/block_traffic.jsonl

Bytes read and written by each operation of a forward and a backward pass, and bytes that the forward pass keeps for the
backward pass where nothing is recomputed. Counted on tensors without memory, not timed. Operations read each argument
and write each result once, which is the least they can; kernels of leap_kernels are launched as on a GPU, but for the
launch, so that what their sums over rows leave in between is counted, too (`python -m leap_kernels audit` proves from
their machine code that they read and write each tensor once). Inductor fuses for an H100 that is not here, and for the
CPU, see benchmarks/fused_traffic.py.
"""

from __future__ import annotations

import gc
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch as mocked

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from leap_kernels import patch, use_backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.fused_traffic import DEVICES, fused
from leapalign.planning.gpu_norms import norms_as_on_a_gpu
from leapalign.planning.ledger import StorageLedger
from leapalign.planning.moved import bytes_moved, is_product

IN_FLUX = {"double": 19, "single": 38}
"""Blocks of each kind."""
KERNELS = {
    "adaln_modulate": ("adaln_kernel", "adaln_backward_kernel"),
    "gated_residual": ("gated_kernel", "gated_backward_kernel"),
    "gelu_tanh": ("gelu_kernel", "gelu_backward_kernel"),
    "_norm_rope_triton": ("norm_rope_kernel", "norm_rope_backward_kernel"),
}
"""By the module that launches them."""


@dataclass(frozen=True)
class Sizes:
    """Tokens and widths; FLUX.1-dev's at 720 x 720."""

    image: int = 45 * 45
    text: int = 512
    heads: int = 24
    head: int = 128
    axes: tuple[int, ...] = (16, 56, 56)
    dtype: torch.dtype = torch.bfloat16

    @property
    def width(self) -> int:
        return self.heads * self.head


FLUX = Sizes()


@dataclass
class Traffic:
    """Bytes that operations moved, by name: matrix products with attention, and the rest."""

    products: Counter[str] = field(default_factory=Counter)
    rest: Counter[str] = field(default_factory=Counter)

    def told(self) -> dict[str, Any]:
        return {
            "products": self.products.total(),
            "rest": self.rest.total(),
            "operations": dict(self.rest.most_common()),
        }


class Counting(TorchDispatchMode):
    """Within the block, counts what operations on fake tensors move."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._opname
        if func.namespace == "leap_kernels":
            self.traffic.rest[name] += launched(name, args)
        elif size := bytes_moved(func, args, kwargs, result):
            (self.traffic.products if is_product(func) else self.traffic.rest)[name] += size
        return result


class _Kernel:
    """Stands in for a Triton kernel: notes the tensors that it is launched with, each once."""

    moved = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            tensors = {id(a): a.nbytes for a in arguments if isinstance(a, Tensor)}
            _Kernel.moved += sum(tensors.values())

        return launch


def launched(name: str, args: tuple[Any, ...]) -> int:
    """Bytes that an op of leap_kernels moves on a GPU: its kernels, and PyTorch's sums of what they leave."""
    module = importlib.import_module(f"leap_kernels.{name.removesuffix('_backward')}")
    run = module._run_backward if name.endswith("_backward") else module._run
    with unset_fake_temporarily(), torch.no_grad(), ExitStack() as stack:
        arguments = tree_map_only(Tensor, _without_memory, list(args))
        for owner, kernels in KERNELS.items():
            for kernel in kernels:
                stack.enter_context(mocked(f"leap_kernels.{owner}.{kernel}", _Kernel()))
        stack.enter_context(mocked("leap_kernels._triton.unavailable", lambda device: None))
        stack.enter_context(use_backend("triton", strict=True))
        _Kernel.moved = 0
        with Counting() as beside:
            run(*arguments)
    return _Kernel.moved + beside.traffic.rest.total()


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def made(kind: str, sizes: Sizes) -> tuple[nn.Module, list[Tensor], tuple[Tensor, Tensor]]:
    """A block, image, text and vector that it takes, all with gradients, and tables of rotations."""
    block_of = {"double": FluxTransformerBlock, "single": FluxSingleTransformerBlock}[kind]
    usual = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    block = block_of(sizes.width, sizes.heads, sizes.head)
    torch.set_default_dtype(usual)
    tokens = ((1, sizes.image, sizes.width), (1, sizes.text, sizes.width), (1, sizes.width))
    streams = [torch.empty(shape, dtype=sizes.dtype, requires_grad=True) for shape in tokens]
    cos, sin = FluxPosEmbed(10000, list(sizes.axes))(torch.zeros(sizes.image + sizes.text, 3))
    return block, streams, (cos, sin)


def eager(kind: str, sizes: Sizes, patched: bool) -> dict[str, Any]:
    """Traffic of both passes, and bytes kept between them: among these the streams that came in, if they are kept."""
    with FakeTensorMode(allow_non_fake_inputs=True), norms_as_on_a_gpu():
        block, streams, tables = made(kind, sizes)
        if patched:
            patch(block)
        block(*streams, tables)  # What all blocks share is there from the first on.
        with Counting() as forward:
            ends = block(*streams, tables)
        at_ends = [torch.empty_like(end) for end in ends]
        with Counting() as backward:
            torch.autograd.grad(ends, [*streams, *block.parameters()], at_ends)
        kept = _kept(block, streams, tables)
    return {"forward": forward.traffic.told(), "backward": backward.traffic.told(), "saved": kept}


def _kept(block: nn.Module, streams: list[Tensor], tables: tuple[Tensor, Tensor]) -> int:
    *tokens, vector = streams
    with StorageLedger() as ledger:
        ledger.exclude(vector, *tables, *block.parameters())
        came_in = [stream + 0 for stream in tokens]
        graph = [end.grad_fn for end in block(*came_in, vector, tables)]
        del came_in
        gc.collect()
        alive = ledger.live
        del graph
    return alive


def compiled(kind: str, sizes: Sizes, device: str) -> dict[str, Any]:
    """The same of what Inductor makes of the block."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        block, (image, text, vector), tables = made(kind, sizes)
        return asdict(fused(block, [image, text], [vector, tables], device))


def measured(sizes: Sizes = FLUX) -> Iterator[dict[str, Any]]:
    for kind, count in IN_FLUX.items():
        block = {"block": kind, "in_flux": count}
        yield {**block, "code": "eager", **eager(kind, sizes, patched=False)}
        for device in DEVICES:
            yield {**block, "code": f"Inductor, {device}", **compiled(kind, sizes, device)}
        yield {**block, "code": "patched", **eager(kind, sizes, patched=True)}


if __name__ == "__main__":
    for line in measured():
        print(json.dumps(line), flush=True)
