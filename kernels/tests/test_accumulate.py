from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, HALVES_AND_FLOAT, LAYOUTS, latents
from leap_kernels import accumulate_, use_backend

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
    ],
)
def test_wrong_arguments_are_named(total, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        accumulate_(total, value)
