"""What the native library computes without asking PyTorch further: nothing that something else would have to see."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import leap_kernels
import pytest
import torch
from leap_kernels import _library, _native, use_backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore:.*beta state", "ignore:The PyTorch API of nested")]

X = torch.ones(2, 3)

PLAIN: dict[str, Callable[[], Any]] = {
    "parameter": lambda: torch.nn.Parameter(X.clone()),
    "bfloat16": X.bfloat16,
    "float16": X.half,
    "transposed": lambda: torch.ones(3, 2).t(),
    "expanded": lambda: torch.ones(1, 3).expand(2, 3),
    "scalar": lambda: torch.ones(()),
    "number": lambda: 0.5,
    "none": lambda: None,
}
OTHERS: dict[str, Callable[[], Any]] = {
    "negated lazily": lambda: torch.complex(X, X).conj().imag,
    "zero": lambda: torch._efficientzerotensor((2, 3)),
    "float64": X.double,
    "integers": X.long,
    "empty": lambda: X[:0],
    "meta": lambda: X.to("meta"),
    "sparse": X.to_sparse,
    "sparse rows": X.to_sparse_csr,
    "opaque": X.to_mkldnn,
    "nested": lambda: torch.nested.nested_tensor([X, X]),
    "functional": lambda: torch._to_functional_tensor(X),
    "subclass": lambda: X.as_subclass(type("Passing", (Tensor,), {})),
    "fake": lambda: FakeTensorMode().from_tensor(X),
    "list": lambda: [X],
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_tensors_need_no_dispatcher(kind: str) -> None:
    arguments = X, PLAIN[kind]()
    assert _native.library().plain(arguments) is True
    assert not _library._observed(arguments)


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_left(kind: str) -> None:
    library, other, total = _native.library(), OTHERS[kind](), X.clone()
    assert library.plain((X, other)) is False
    assert library.plain((other, X)) is False
    assert library.accumulate((total, other)) is False
    assert library.accumulate((other, X)) is False
    assert library.ema_update((total, other, 0.5)) is False
    assert torch.equal(total, X)


def test_pairs_that_take_more_than_a_pass_are_left() -> None:
    library = _native.library()
    for total, value in (
        (torch.zeros(2, 3), torch.ones(3, 2)),
        (torch.zeros(2, 3), torch.ones(2, 3, 1)),
        (torch.zeros(3, 2).t(), torch.ones(2, 3)),
        (torch.zeros(2, 3), torch.ones(3, 2).t()),
        (torch.zeros(2, 3), torch.ones(1, 3).expand(2, 3)),
    ):
        assert library.accumulate((total, value)) is False
        assert library.ema_update((total, value, 0.5)) is False
        assert not total.any()


def test_transforms_modes_and_profilers_see_the_ops() -> None:
    library, seen = _native.library(), []

    def look(x: Tensor) -> Tensor:
        seen.append(library.plain((x,)))
        return x.sum()

    torch.vmap(look)(X)
    torch.func.grad(look)(X)
    with FakeTensorMode():
        seen.append(library.plain((X,)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        seen.append(library.plain((X,)))
    assert seen == [False] * 4
    assert library.plain((X,))


CALLS: dict[str, Callable[[], Tensor]] = {
    "accumulate_": lambda: leap_kernels.accumulate_(X.clone(), X.bfloat16()),
    "ema_update_": lambda: leap_kernels.ema_update_(X.clone(), X.bfloat16(), 0.5),
    "gelu_tanh": lambda: leap_kernels.gelu_tanh(X),
    "swiglu": lambda: leap_kernels.swiglu(X, X),
    "gated_residual": lambda: leap_kernels.gated_residual(X[None], X[:1], X[None]),
    "group_norm_silu": lambda: leap_kernels.group_norm_silu(X[:, None], 1),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_usual_call_asks_no_further_and_one_under_another_setting_does(op: str, monkeypatch) -> None:
    expected, asked = CALLS[op](), []
    module = sys.modules[f"leap_kernels.{op.removesuffix('_')}"]
    monkeypatch.setattr(module, "choose", lambda *_: asked.append(op) or "reference")
    assert torch.equal(CALLS[op](), expected)
    assert not asked
    with use_backend("reference"):
        torch.testing.assert_close(CALLS[op](), expected)
    assert asked == [op]


def test_a_call_with_wrong_arguments_is_refused() -> None:
    with pytest.raises(TypeError, match="leap_accumulate takes 5 arguments, not 2"):
        _native.call("leap_accumulate", X, X)
    with pytest.raises(RuntimeError, match="leap_accumulate failed: unknown dtype"):
        _native.call("leap_accumulate", X, X, 6, torch.float64, torch.float32)
    with pytest.raises(TypeError):
        _native.call("leap_accumulate", X, X, 0.5, torch.float32, torch.float32)
