"""Bytes that operations move, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from leapalign.planning.gpu_norms import NormsCounted, norms_as_on_a_gpu
from leapalign.planning.moved import bytes_moved, is_product

ROWS, WIDTH = 6, 4
ONE = ROWS * WIDTH * 4
"""Bytes of one tensor."""


class Moved(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += bytes_moved(func, args, kwargs or {}, result)
        self.products += is_product(func)
        return result


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x, y: x + y, 3 * ONE),
        (lambda x, y: x + 1, 2 * ONE),
        (lambda x, y: x.add_(y), 3 * ONE),
        (lambda x, y: x.copy_(y), 2 * ONE),
        (lambda x, y: x.zero_(), ONE),
        (lambda x, y: torch.mul(x, x), 3 * ONE),
        (lambda x, y: torch.cat([x, y]), 4 * ONE),
        (lambda x, y: x.sum(dim=0), ONE + WIDTH * 4),
        (lambda x, y: x[:1].expand(ROWS, WIDTH) + y, 2 * ONE + WIDTH * 4),
        (lambda x, y: x.to(torch.bfloat16), ONE + ONE // 2),
        (lambda x, y: x.t().contiguous(), 2 * ONE),
        (lambda x, y: x.t().reshape(-1), 2 * ONE),
        (lambda x, y: (x.contiguous(), x.view(-1), x[1:], x.chunk(2), x.detach(), x.reshape(-1)), 0),
        (lambda x, y: (torch.empty_like(x), x.new_empty(3), torch.empty(3)), 0),
        (lambda x, y: torch.ops.aten._unsafe_view(x, (-1,)), 0),
        (lambda x, y: torch._foreach_add([x, y], 1.0), 4 * ONE),
        (lambda x, y: torch.zeros(ROWS, WIDTH), ONE),
    ],
)
def test_each_argument_and_result_counts_once(run: Callable[[Tensor, Tensor], Any], expected: int) -> None:
    with FakeTensorMode():
        x, y = torch.empty(ROWS, WIDTH), torch.empty(ROWS, WIDTH)
        with Moved() as moved:
            run(x, y)
    assert moved.total == expected


def test_products_are_told_apart() -> None:
    with FakeTensorMode():
        x = torch.empty(1, 2, ROWS, WIDTH, requires_grad=True)
        with Moved() as moved:
            out = nn.functional.scaled_dot_product_attention(x, x, x) @ torch.empty(WIDTH, WIDTH)
        assert moved.products == 2
        with Moved() as moved:
            out.backward(torch.empty_like(out))
        assert moved.products == 2


def test_a_norm_is_one_operation_each_way_on_a_gpu() -> None:
    numbers = ROWS * 4
    with FakeTensorMode(), norms_as_on_a_gpu():
        x, norm = torch.empty(ROWS, WIDTH, requires_grad=True), nn.RMSNorm(WIDTH, eps=1e-6)
        with Moved() as moved:
            out = norm(x)
        assert moved.total == 2 * ONE + WIDTH * 4 + numbers
        with Moved() as moved:
            torch.autograd.grad(out, [x, norm.weight], torch.empty_like(out))
        assert moved.total == 3 * ONE + 2 * WIDTH * 4 + numbers
        with Moved() as moved:
            nn.RMSNorm(WIDTH, eps=1e-6, dtype=torch.bfloat16)(x)
        assert moved.total > 4 * ONE, "with a weight of another dtype it is many operations on a GPU, too"


def test_a_norm_that_runs_in_parts_is_noted_as_on_a_gpu() -> None:
    """With the operations around it, and none of its parts; vectors of weights are too small to note."""
    noted: list[int] = []
    norms = NormsCounted(noted.append)

    class Outside(Moved):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if norms.inside:
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    numbers = ROWS * 4
    with FakeTensorMode(), norms.counted():
        x, norm = torch.empty(ROWS, WIDTH, requires_grad=True), nn.RMSNorm(WIDTH, eps=1e-6)
        with Outside() as outside:
            out = norm(x * x) * 2
        assert (noted, outside.total) == ([2 * ONE + numbers], 3 * ONE + 2 * ONE)
        with Outside() as outside:
            torch.autograd.grad(out, [x, norm.weight], torch.empty_like(out))
        assert noted[1:] == [3 * ONE + numbers]
        # The gradient times 2, then twice times x, and their sum.
        assert outside.total == 2 * ONE + 2 * 3 * ONE + 3 * ONE
        assert not norms.inside
