from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, HALVES_AND_FLOAT, LAYOUTS, latents
from leap_kernels import accumulate_, use_backend

SHARED = torch.arange(6.0)
by_backend = pytest.mark.parametrize("backend", BACKENDS)


@by_backend
@pytest.mark.parametrize("value_dtype", HALVES_AND_FLOAT, ids=str)
def test_float32_sums_have_the_bits_of_add(backend: str, value_dtype: torch.dtype) -> None:
    total, value = latents(100_003, dtype=torch.float32), latents(100_003, dtype=value_dtype)
    expected = total.clone().add_(value)
    with use_backend(backend, strict=True):
        assert accumulate_(total, value) is total
    assert torch.equal(total, expected)


@by_backend
@pytest.mark.parametrize("layout", [layout for name, layout in LAYOUTS.items() if name != "expanded"])
def test_strided_sums_are_written_in_place(backend: str, layout) -> None:
    total, value = layout(latents(3, 8, 9, dtype=torch.float32)), latents(3, 8, 9, dtype=torch.bfloat16)
    expected = total + value
    with use_backend(backend, strict=True):
        accumulate_(total, layout(value))
    assert torch.equal(total, expected)


def test_float64_stays_float64_and_nothing_is_a_sum() -> None:
    total = torch.ones(3, dtype=torch.float64)
    accumulate_(total, torch.full((3,), 1e-12, dtype=torch.float64))
    assert total.tolist() == [1 + 1e-12] * 3
    assert accumulate_(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("total", "value", "message"),
    [
        (torch.zeros(2).int(), torch.zeros(2), "int32"),
        (torch.zeros(2), torch.zeros(3), "alike"),
        (torch.zeros(1).expand(2), torch.zeros(2), "expanded"),
        (SHARED[:-1], SHARED[1:], "memory of their own"),
        (SHARED, SHARED, "memory of their own"),
        (torch.zeros(2, requires_grad=True), torch.zeros(2), r"total\.detach"),
    ],
)
def test_wrong_arguments_are_named(total, value, message) -> None:
    before = total.detach().clone()
    with pytest.raises(ValueError, match=message):
        accumulate_(total, value)
    assert torch.equal(total, before)


def test_neighbours_in_one_memory_and_leaves_without_a_graph_add_up() -> None:
    whole = torch.arange(6.0)
    accumulate_(whole[:3], whole[3:])
    assert whole.tolist() == [3, 5, 7, 3, 4, 5]
    accumulate_(whole[::2], whole[1::2])
    assert whole.tolist() == [8, 5, 10, 3, 9, 5]
    leaf = torch.zeros(2, requires_grad=True)
    with torch.no_grad():
        accumulate_(leaf, torch.ones(2))
    assert leaf.tolist() == [1, 1]
