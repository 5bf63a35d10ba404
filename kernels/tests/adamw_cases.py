"""Weights, gradients and runs that the tests of `adamw_8bit_step_` share."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS
from leap_kernels import Adam8bitState, adamw_8bit_step_, use_backend
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)
SIZES = (1, 255, 256, 257, 1009, 8192 + 300)
SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "seed": 7, "offset": 0}
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
by_gradient_dtype = pytest.mark.parametrize("gradient_dtype", FLOATS, ids=str)


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * 0.03).to(dtype)


def gradients(steps: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return gradients over many magnitudes, as those of a network are."""
    return [(torch.randn(shape) * 10 ** (-4 * torch.rand(shape) - 2)).to(dtype) for _ in range(steps)]


def taken(backend: str, parameter: Tensor, steps: list[Tensor], **settings: float) -> list[tuple[Tensor, ...]]:
    """Return parameter, state1, absmax1, state2 and absmax2 after each step."""
    parameter, state, results = parameter.clone(), Adam8bitState.zeros_like(parameter), []
    for number, gradient in enumerate(steps, 1):
        with use_backend(backend, strict=True):
            adamw_8bit_step_(parameter, gradient, state, step=number, **(SETTINGS | settings))
        results.append(tuple(tensor.clone() for tensor in (parameter, *state.tensors())))
    return results


def assert_same_states(results: list, others: list) -> None:
    for result, other in zip(results, others, strict=True):
        for got, want in zip(result[1:], other[1:], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
