"""What torch.compile's Inductor makes of a network: bytes that its fused kernels move, and bytes that it keeps.

Read from the nodes of Inductor's scheduler, each of which would become one kernel: what it reads and writes, without
what stays in it. Its own passes, partitioner and rules of fusion run; code is not generated. For the CPU they are asked
as they are. For a GPU they are told that an H100 is here: the graph's tensors are moved to it, and lie nowhere.
Matrix products stay calls of a library on both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, dependencies, ir, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map, tree_map_only

from leapalign.planning.moved import is_product

DEVICES = {"H100": torch.device("cuda", 0), "CPU": torch.device("cpu")}
_H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    total_memory=80 * 2**30,
)


@dataclass
class Fused:
    """Bytes by the kernels' kind, and what the forward pass hands to the backward pass."""

    forward: dict[str, Any] = field(default_factory=dict)
    backward: dict[str, Any] = field(default_factory=dict)
    saved: int = 0


def fused(block: nn.Module, tokens: list[Tensor], others: list[Any], device: str) -> Fused:
    """Both passes of ``block(*tokens, *others)``, of fake tensors in their mode: gradients of all that ask for one.

    tokens: count as saved where they are, as weights and the others do not; the block returns as many tensors.
    """
    found = Fused()

    def inner(graph: torch.fx.GraphModule, inputs: list[Any], is_backward: bool = False, **_: Any) -> Any:
        results = graph(*inputs) if is_backward else _noting_saved(found, graph, inputs, tokens)
        told = _traffic(graph, inputs, DEVICES[device], is_backward)
        found.backward, found.forward = (told, found.forward) if is_backward else (found.backward, told)
        return _boxed(lambda: results)

    torch._dynamo.reset()
    backend = functools.partial(compile_fx.compile_fx, inner_compile=inner)
    ends = torch.compile(block, backend=backend, dynamic=False)(*tokens, *others)
    given = [one for one in (*tokens, *others, *block.parameters()) if isinstance(one, Tensor)]
    torch.autograd.grad(ends, [one for one in given if one.requires_grad], [torch.empty_like(end) for end in ends])
    return found


def _boxed(results: Callable[[], Any]) -> Any:
    def run(arguments: list[Any]) -> Any:
        arguments.clear()
        return results()

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _noting_saved(found: Fused, graph: torch.fx.GraphModule, inputs: list[Any], tokens: list[Tensor]) -> Any:
    results = graph(*inputs)
    shapes = [token.shape for token in tokens]
    # The compiler's inputs are others than the block's.
    left_out = {_storage(one) for one in inputs if isinstance(one, Tensor) and one.shape not in shapes}
    # The results of the block, as many as its tokens, come first.
    saved = [one for one in results[len(tokens) :] if isinstance(one, Tensor)]
    kept = {_storage(one): one.untyped_storage().nbytes() for one in saved}
    found.saved = sum(size for storage, size in kept.items() if storage not in left_out)
    return results


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _traffic(graph: torch.fx.GraphModule, inputs: list[Any], device: torch.device, is_backward: bool) -> dict[str, Any]:
    """Bytes that the kernels move which Inductor makes of a graph."""
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_an_h100_is_here())
            inputs = _moved_to(graph, inputs, device)
        compile_fx.view_to_reshape(graph)
        with torch.no_grad():
            mode = compile_fx.fake_tensor_prop(graph, inputs)
        compile_fx._recursive_record_original_output_strides(graph)
        stack.enter_context(V.set_fake_mode(mode))
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowered = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward)
        for context in (
            V.set_graph_handler(lowered),
            V.set_extern_kernel_nodes([]),
            V.set_debug_handler(DebugContext()),
        ):
            stack.enter_context(context)
        lowered.run(*inputs)
        lowered.init_wrapper_code()
        lowered._update_scheduler()
        told: dict[str, Any] = {"products": 0, "rest": 0, "operations": {}}
        for node in lowered.scheduler.nodes:
            name, size = _name(node), _bytes(node)
            told["products" if name is None else "rest"] += size
            if name is not None and size:
                told["operations"][name] = told["operations"].get(name, 0) + size
        return told


@contextmanager
def _an_h100_is_here() -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in (
            (CudaInterface, "get_device_properties", lambda device=None: _H100),
            (CudaInterface, "current_device", lambda: 0),
            (CudaInterface.Worker, "get_device_properties", lambda device=None: _H100),
            (torch.cuda, "get_device_properties", lambda device=None: _H100),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (scheduler, "has_triton", lambda: True),
        ):
            static = staticmethod(value) if isinstance(owner, type) else value
            stack.enter_context(patch.object(owner, name, static))
        yield


def _moved_to(graph: torch.fx.GraphModule, inputs: list[Any], device: torch.device) -> list[Any]:
    """The inputs on ``device``, where the graph now makes its tensors, too."""
    mode = detect_fake_mode(inputs)
    assert isinstance(mode, FakeTensorMode)

    def moved(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for node in graph.graph.nodes:
        node.args, node.kwargs = (
            tree_map(lambda value: device if isinstance(value, torch.device) else value, given)
            for given in (node.args, node.kwargs)
        )
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, moved, node.meta["val"])
    return [moved(one) if isinstance(one, Tensor) else one for one in inputs]


def _name(node: Any) -> str | None:
    """What kind of kernel a node becomes; None for a product or an attention."""
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        op = getattr(node.node, "op_overload", None)
        return None if isinstance(node.node, ir.MultiOutput) or is_product(op) else str(op)
    return "fused" if len(node.get_nodes()) > 1 else "single"


def _bytes(node: Any) -> int:
    """Bytes that a kernel reads and writes: of each tensor the elements at the places that it names, no more than are
    there, and nothing of tensors that no other kernel reads."""
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return 0
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        return int(node.get_read_write_buffers_sizes())
    own = set(node.get_nodes())
    total = 0
    for accesses in (node.read_writes.reads, node.read_writes.writes):
        elements: dict[str, int] = {}
        for access in accesses:
            if isinstance(access, dependencies.MemoryDep | dependencies.StarDep) and not _stays(access.name, own):
                elements[access.name] = elements.get(access.name, 0) + int(access.get_numel())
        total += sum(min(count, _numel(name)) * _itemsize(name) for name, count in elements.items())
    return total


def _stays(name: str, own: set[Any]) -> bool:
    """Whether a tensor is made in a kernel and read by no other, nor a result."""
    buffer = V.graph.scheduler.name_to_buf.get(name)
    if buffer is None or buffer.defining_op not in own:
        return False
    return all(user.node in own for user in buffer.users)


def _numel(name: str) -> int:
    return math.prod(int(size) for size in V.graph.get_buffer(name).get_size())


def _itemsize(name: str) -> int:
    return int(V.graph.get_dtype(name).itemsize)
