"""The ops of transformer blocks as PyTorch sees them: graphs, fake tensors, and what is saved for the backward pass."""

from __future__ import annotations

import dataclasses
import sys
import threading

import pytest
import torch
from block_cases import BLOCK_CASES, BlockCase, by_block_case, samples
from kernel_cases import BACKENDS
from leap_kernels import use_backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

OPS = torch.ops.leap_kernels
by_backend = pytest.mark.parametrize("backend", BACKENDS)


@by_backend
@pytest.mark.parametrize("name", samples(torch.float32))
def test_opcheck(name: str, backend: str) -> None:
    with use_backend(backend, strict=True):
        for dtype in (torch.float32, torch.bfloat16):
            for arguments in samples(dtype)[name]:
                opcheck(getattr(OPS, name).default, arguments)


@by_block_case
def test_compiles_to_one_graph(case: BlockCase) -> None:
    inputs = case.inputs((2, 3, 5), torch.float32)
    compiled = dataclasses.replace(case, op=torch.compile(case.op, fullgraph=True, backend="aot_eager"))
    for got, want in zip(compiled.run(inputs), case.run(inputs), strict=True):
        assert torch.equal(got, want)
    torch.compiler.reset()


@by_block_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(case: BlockCase, dtype: torch.dtype) -> None:
    inputs = case.inputs((2, 3, 5), dtype)
    with FakeTensorMode() as mode:
        fakes = case.run({name: mode.from_tensor(value) for name, value in inputs.items()})
    for fake, real in zip(fakes, case.run(inputs), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@by_block_case
def test_transforms_differentiate(case: BlockCase) -> None:
    inputs = case.inputs((2, 3, 5), torch.float32)
    grad = inputs.pop("grad")
    _, vjp = torch.func.vjp(lambda *values: case.op(**dict(zip(inputs, values, strict=True))), *inputs.values())
    for got, want in zip(vjp(grad), case.run(inputs | {"grad": grad})[1:], strict=True):
        assert torch.equal(got, want)


@by_block_case
def test_checkpointing_gives_the_same_gradients(case: BlockCase) -> None:
    inputs = case.inputs((2, 3, 5), torch.float32)
    again = dataclasses.replace(
        case, op=lambda **leaves: torch.utils.checkpoint.checkpoint(lambda: case.op(**leaves), use_reentrant=False)
    )
    for got, want in zip(again.run(inputs), case.run(inputs), strict=True):
        assert torch.equal(got, want)


@by_block_case
def test_backward_pass_in_another_thread_keeps_the_setting(case: BlockCase, monkeypatch) -> None:
    used = []
    name = next(name for name, other in BLOCK_CASES.items() if other is case).partition("/")[0]
    module = sys.modules[f"leap_kernels.{name}"]
    backward = module.reference_backward
    monkeypatch.setitem(module._BACKWARD, "reference", lambda *all: used.append(name) or backward(*all))
    inputs = {key: value.requires_grad_() for key, value in case.inputs((2, 3, 4), torch.float32).items()}
    del inputs["grad"]
    with use_backend("reference"):
        output = case.op(**inputs)
    thread = threading.Thread(target=lambda: output.sum().backward())
    thread.start()
    thread.join()
    assert used == [name]


@by_block_case
def test_gradients_of_gradients_are_refused(case: BlockCase) -> None:
    leaves = {name: value.requires_grad_() for name, value in case.inputs((2, 3, 4), torch.float32).items()}
    grad = leaves.pop("grad")
    first = torch.autograd.grad(case.op(**leaves), list(leaves.values()), grad, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        sum(value.sum() for value in first).backward()


def _saved_bytes(case: BlockCase, inputs: dict[str, Tensor], needed: tuple[str, ...]) -> int:
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.op(**{name: inputs[name].detach().requires_grad_(name in needed) for name in inputs})
    return sum(storages.values())


@by_block_case
def test_saved_bytes(case: BlockCase) -> None:
    inputs = case.inputs((2, 40, 64), torch.bfloat16)
    del inputs["grad"]
    a_row, of_vectors = 2 * 64, 2 * 6 * 64 * 2 if case.vectors else 0
    statistics = 2 * 4 * 80 if "scale" in inputs else 0
    assert _saved_bytes(case, inputs, tuple(inputs)) == case.saved * 80 * a_row + of_vectors + statistics
    # A gate without a gradient does not need what it multiplies.
    if "gate" in case.vectors:
        assert _saved_bytes(case, inputs, ("x", "y")) == of_vectors
