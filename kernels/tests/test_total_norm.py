from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from kernel_cases import LAYOUTS
from leap_kernels import BackendUnavailable, total_norm, use_backend
from leap_kernels.total_norm import BLOCK
from torch import Tensor

MODULE = sys.modules["leap_kernels.total_norm"]
SIZES = (1, 16, 255, BLOCK, BLOCK + 1, 2 * BLOCK + 304)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])


def drawn(sizes: tuple[int, ...] = SIZES, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Tensor]:
    return [(torch.rand(()) * torch.randn(size)).to(dtype) for size in sizes for dtype in dtypes]


def exact(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.flatten().double() for tensor in tensors]).norm().item()


@by_backend
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
def test_norm_is_that_of_the_values(backend: str, dtypes: tuple[torch.dtype, ...]) -> None:
    tensors = drawn(dtypes=dtypes)
    with use_backend(backend, strict=True):
        norm, again = total_norm(tensors), total_norm(tensors)
    assert (norm.dtype, norm.shape) == (torch.float32, ())
    # PyTorch adds the squares of a tensor up one after the other.
    assert norm.item() == pytest.approx(exact(tensors), rel=1e-6 if backend == "triton" else 1e-5)
    assert torch.equal(norm, again)


@by_backend
@pytest.mark.parametrize("position", [0, 1, 5])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e30])
def test_what_is_not_finite_makes_the_norm_so(backend: str, position: int, value: float) -> None:
    """And so does a sum of squares that float32 cannot hold."""
    tensors = drawn(dtypes=(torch.float32,))
    tensors[position][-1] = value
    with use_backend(backend, strict=True):
        assert not total_norm(tensors).isfinite()


@by_backend
def test_strided_tensors_and_empty_ones(backend: str) -> None:
    plain = torch.randn(3, 8, 90)
    with use_backend(backend, strict=True):
        for layout in LAYOUTS.values():
            tensors = [torch.zeros(0), layout(plain), torch.zeros(2, 0)]
            assert total_norm(tensors).item() == pytest.approx(layout(plain).double().norm().item(), rel=1e-6)
        assert total_norm([torch.zeros(0), torch.zeros(3, 0)]) == 0
        assert total_norm([]) == 0


@pytest.mark.interpreter
def test_there_is_a_launch_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[torch.dtype, int, bool]] = []
    launch = MODULE.launch

    def counted(first: Tensor, tensors: Any, aligned: bool) -> Tensor:
        launches.append((first.dtype, len(tensors.rows), aligned))
        return launch(first, tensors, aligned)

    monkeypatch.setattr(MODULE, "launch", counted)
    with use_backend("triton", strict=True):
        total_norm(drawn((16, 32, 48), (torch.bfloat16,)))
        assert launches == [(torch.bfloat16, 3, True)]
        launches.clear()
        total_norm([torch.ones(16), torch.ones(17), torch.ones(16).half(), torch.ones(33)[1:]])
    assert launches == [(torch.float32, 1, True), (torch.float32, 2, False), (torch.float16, 1, True)]


def test_float64_stays() -> None:
    tensors = [torch.randn(100, dtype=torch.float64), torch.randn(5)]
    norm = total_norm(tensors)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(exact(tensors), rel=1e-6)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"float64, not torch\.int64"):
        total_norm([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="they are on cpu and meta"):
        total_norm([torch.ones(2), torch.ones(2, device="meta")])
    with use_backend("native", strict=True), pytest.raises(BackendUnavailable, match="PyTorch's own norm"):
        total_norm([torch.ones(2)])
