"""A linear layer of two inputs is that of both joined, and joins them only where it has to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from leap_kernels._patch_linear import joined
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

A, B, OUT = 3, 5, 4


class Joins(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 6, width, generator=generator, dtype=dtype, requires_grad=True) for width in (A, B)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("a",), ("b",), ("weight",), ("bias",)], ids=str)
def test_values_and_gradients_are_those_of_both_joined(bias: bool, frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    linear, (a, b) = nn.Linear(A + B, OUT, bias=bias, dtype=torch.float64), inputs()
    wanted = {"a": a, "b": b, **dict(linear.named_parameters())}
    for name in frozen:
        if name in wanted:
            wanted.pop(name).requires_grad_(False)
    at_end = torch.randn(2, 6, OUT, dtype=torch.float64)
    found = []
    with Joins() as joins:
        ours = joined(linear, a, b)
        found.append((ours, *torch.autograd.grad(ours, list(wanted.values()), at_end)))
    assert joins.count == 0
    theirs = linear(torch.cat([a, b], dim=-1))
    found.append((theirs, *torch.autograd.grad(theirs, list(wanted.values()), at_end)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


class Other(nn.Linear):
    """Not PyTorch's own, as adapters are not."""


@pytest.mark.parametrize(
    "made",
    [
        lambda: Other(A + B, OUT, dtype=torch.float64),
        lambda: nn.Sequential(nn.Linear(A + B, OUT, dtype=torch.float64)),
        lambda: _hooked(nn.Linear(A + B, OUT, dtype=torch.float64)),
    ],
)
def test_another_layer_is_called_as_it_is(made: Callable[[], nn.Module]) -> None:
    layer, (a, b) = made(), inputs()
    with Joins() as joins:
        out = joined(layer, a, b)
    assert joins.count == 1
    assert torch.equal(out, layer(torch.cat([a, b], dim=-1)))


def _hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, given, out: 2 * out)
    return layer


def test_autocast_decides_by_itself() -> None:
    layer, (a, b) = nn.Linear(A + B, OUT), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = joined(layer, a, b)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad is not None
