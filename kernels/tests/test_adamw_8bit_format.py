"""The bytes of `adamw_8bit_step_` are those of bitsandbytes."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from adamw_cases import (
    SETTINGS,
    SIZES,
    assert_same_states,
    by_backend,
    by_dtype,
    by_gradient_dtype,
    gradients,
    taken,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st
from leap_kernels import Adam8bitState, adamw_8bit_step_, use_backend
from leap_kernels._moments import MAP1, MAP2, multiply_add
from torch import Tensor


def bitsandbytes_taken(parameter: Tensor, steps: list[Tensor], gradient_scale: float, **betas: float) -> list:
    parameter, state, results = parameter.clone(), Adam8bitState.zeros_like(parameter), []
    moments = (state.state1, state.state2)
    beta1, beta2 = (betas.get(name, SETTINGS[name]) for name in ("beta1", "beta2"))
    for number, gradient in enumerate(steps, 1):
        numbers = (beta1, beta2, 0.0, 0.0, SETTINGS["eps"], number, SETTINGS["lr"])
        maps = (MAP1, MAP2, state.absmax1, state.absmax2)
        bnb.optimizer_update_8bit_blockwise(
            "adam", gradient, parameter, *moments, *numbers, *maps, gnorm_scale=gradient_scale
        )
        results.append(tuple(tensor.clone() for tensor in (parameter, *state.tensors())))
    return results


@pytest.mark.parametrize(("entries", "signed"), [(MAP1, True), (MAP2, False)], ids=["signed", "unsigned"])
def test_maps_are_those_of_bitsandbytes(entries: Tensor, signed: bool) -> None:
    assert torch.equal(entries, bnb.create_dynamic_map(signed=signed))


@by_backend
def test_every_byte_stands_for_its_entry(backend: str) -> None:
    """Without a gradient and at these settings, weights of 0 become the first moment over the root of the second."""
    every, top = torch.arange(256, dtype=torch.uint8), torch.full((256,), 255, dtype=torch.uint8)
    settings = SETTINGS | {"lr": 1.0, "beta1": 0.5, "beta2": 0.75, "weight_decay": 0.0}
    for state1, state2, eps, expected in (
        (every, torch.zeros_like(every), 1.0, -MAP1),
        (top, every, 0.0, -1 / ((MAP2 * 0.75).double().sqrt().float() / 0.5)),
    ):
        state, parameter = Adam8bitState(state1.clone(), torch.ones(1), state2.clone(), torch.ones(1)), torch.zeros(256)
        with use_backend(backend, strict=True):
            adamw_8bit_step_(parameter, torch.zeros(256), state, **(settings | {"eps": eps}), step=1)
        assert torch.equal(parameter, expected)


@pytest.mark.bitsandbytes
@by_backend
@by_gradient_dtype
@by_dtype
@pytest.mark.parametrize("size", SIZES)
def test_states_are_those_of_bitsandbytes(
    backend: str, gradient_dtype: torch.dtype, dtype: torch.dtype, size: int
) -> None:
    parameter, steps = weights(size, dtype=dtype), gradients(5, size, dtype=gradient_dtype)
    results = taken(backend, parameter, steps, gradient_scale=0.37)
    assert_same_states(results, bitsandbytes_taken(parameter, steps, 0.37))
    assert all(result[1].unique().numel() > min(100, size // 3) for result in results)


@pytest.mark.slow
@pytest.mark.bitsandbytes
@by_backend
def test_bytes_are_those_of_bitsandbytes_around_every_place_of_the_table(backend: str) -> None:
    """Without memory (beta 0) a moment is the gradient, or its square: any float can be turned into a byte."""
    middles = (torch.arange(65537, dtype=torch.float64) - 0.5) / 32767.5 - 1
    words = middles.clamp(-1, 1).float().view(torch.int32)
    # The interpreter takes its time.
    reach = 1 if backend == "triton" else 4
    around = torch.cat([(words + ulps).view(torch.float32) for ulps in range(-reach, reach + 1)])
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e-30, 1e-7, 0.5, 1.0, -1.0])
    half_way = torch.cat([entries[:-1] / 2 + entries[1:] / 2 for entries in (MAP1, MAP2)])
    values = torch.cat([around, around.abs().sqrt(), tiny, half_way, -half_way, half_way.sqrt()])
    # In each group a 1, so that the others are what they are.
    values = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    steps = [torch.nn.functional.pad(values, (1, 0), value=1.0).flatten()]
    betas = {"beta1": 0.0, "beta2": 0.0}
    results = taken(backend, torch.zeros_like(steps[0]), steps, **betas)
    assert_same_states(results, bitsandbytes_taken(torch.zeros_like(steps[0]), steps, 1.0, **betas))
    # Seven entries are nearer to 0 than any place.
    assert results[0][1].unique().numel() == 249


@pytest.mark.slow
@pytest.mark.bitsandbytes
@by_backend
@given(words=st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=300), scale=st.sampled_from([1.0, 1e-30]))
def test_states_are_those_of_bitsandbytes_for_any_float(backend: str, words: list[int], scale: float) -> None:
    """Infinities, NaN and denormals too."""
    gradient = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)
    steps = [gradient, gradient.flip(0), torch.ones_like(gradient)]
    results = taken(backend, weights(len(words)), steps, gradient_scale=scale)
    assert_same_states(results, bitsandbytes_taken(weights(len(words)), steps, scale))


@pytest.mark.bitsandbytes
def test_float32_weights_are_those_of_bitsandbytes_but_for_the_root() -> None:
    """Without decay. PyTorch's root, which bitsandbytes takes, may be off by its last bit."""
    parameter, steps = weights(5000), gradients(3, 5000)
    results = taken("reference", parameter, steps, weight_decay=0.0)
    for result, other in zip(results, bitsandbytes_taken(parameter, steps, 1.0), strict=True):
        torch.testing.assert_close(result[0], other[0], rtol=2**-22, atol=2**-21 * SETTINGS["lr"])


def test_multiply_add_rounds_once() -> None:
    """Here float64 rounds to a tie of float32, from above or below, unless it is told."""
    one, tiny = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([2.0**-60, -(2.0**-60), 2.0**-60, -(2.0**-60)])
    tie = one * (1 + 2**-12)
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24 is half-way between two floats.
    result = multiply_add(tie, 1 + 2**-12, tiny)
    low, high = 1 + 2**-11, 1 + 2**-11 + 2**-23
    assert result.tolist() == [high, low, -low, -high]
