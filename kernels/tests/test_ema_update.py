from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, HALVES_AND_FLOAT, LAYOUTS, latents
from leap_kernels import ema_update_, use_backend

by_backend = pytest.mark.parametrize("backend", BACKENDS)


@by_backend
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("weights_dtype", HALVES_AND_FLOAT, ids=str)
def test_every_pair_of_dtypes(backend: str, dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    average, weights = latents(1023, dtype=dtype), latents(1023, dtype=weights_dtype)
    before = average.double()
    with use_backend(backend, strict=True):
        assert ema_update_(average, weights, 0.75) is average
    assert average.dtype == dtype
    exact = 0.75 * before + 0.25 * weights.double()
    # Three quarters and a quarter are exact; Triton's interpreter cuts bfloat16 off.
    torch.testing.assert_close(average.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@by_backend
def test_follows_constant_weights_at_its_rate_and_then_rests(backend: str) -> None:
    average, weights = torch.zeros(5), torch.full((5,), 3.0, dtype=torch.bfloat16)
    with use_backend(backend, strict=True):
        for _ in range(10):
            ema_update_(average, weights, 0.9)
        torch.testing.assert_close(average, torch.full((5,), 3 * (1 - 0.9**10)))
        average.fill_(3.0)
        ema_update_(average, weights, 0.1234)
    assert average.tolist() == [3.0] * 5


@by_backend
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_ends_of_the_range(backend: str, decay: float) -> None:
    average, weights = latents(9, dtype=torch.float32), latents(9, dtype=torch.float32)
    expected = (average if decay else weights).clone()
    with use_backend(backend, strict=True):
        ema_update_(average, weights, decay)
    torch.testing.assert_close(average, expected)


@by_backend
@pytest.mark.parametrize("layout", [layout for name, layout in LAYOUTS.items() if name != "expanded"])
def test_strided_averages_are_written_in_place(backend: str, layout) -> None:
    average, weights = layout(latents(3, 8, 9, dtype=torch.float32)), latents(3, 8, 9, dtype=torch.float32)
    expected = average + 0.5 * (weights - average)
    with use_backend(backend, strict=True):
        ema_update_(average, layout(weights), 0.5)
    torch.testing.assert_close(average, expected)


def test_parameters_and_empty_tensors() -> None:
    weights = torch.nn.Parameter(torch.ones(3))
    average = torch.nn.Parameter(torch.zeros(3))
    ema_update_(average, weights, 0.5)
    assert average.tolist() == [0.5] * 3
    assert average.is_leaf
    assert ema_update_(torch.zeros(0), torch.zeros(0), 0.5).shape == (0,)


@pytest.mark.parametrize(
    ("average", "weights", "decay", "message"),
    [
        (torch.zeros(2).int(), torch.zeros(2), 0.5, "int32"),
        (torch.zeros(2), torch.zeros(3), 0.5, "alike"),
        (torch.zeros(1).expand(2), torch.zeros(2), 0.5, "expanded"),
        (torch.zeros(2), torch.zeros(2), 1.5, "decay"),
        (torch.zeros(2), torch.zeros(2), float("nan"), "decay"),
    ],
)
def test_wrong_arguments_are_named(average, weights, decay, message) -> None:
    with pytest.raises(ValueError, match=message):
        ema_update_(average, weights, decay)
