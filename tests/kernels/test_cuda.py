"""Every op on a CUDA device, its Triton kernels compiled and run, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from adamw_cases import assert_same_states, by_dtype, by_gradient_dtype, gradients, taken, weights
from kernel_cases import CASES, HALVES_AND_FLOAT, SHAPES, WORDS, Case, assert_accurate, by_case
from leap_kernels import Adam8bitState, accumulate_, adamw_8bit_step_, euler_step, stochastic_round_, use_backend
from leap_kernels._catalog import OPS

DEVICE = "cuda"
HUGE = (1 << 31) + 1009
"""Elements, more than 32 bits of a signed number count."""
by_offset = pytest.mark.parametrize("offset", [0, 8, 5, (1 << 62) + 3])


def test_no_op_is_left_out() -> None:
    here = {"adamw_8bit_step_", "stochastic_round_"}
    assert {name.partition("/")[0] for name in CASES} | here == {op.name for op in OPS}


@pytest.mark.cuda
@by_case
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (3, 4096)], ids=str)
def test_error_against_float64(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of outputs and gradients; the same bits when run again."""
    inputs = case.inputs(shape, dtype)
    moved = {name: value.to(DEVICE) for name, value in inputs.items()}
    with use_backend("triton", strict=True):
        results, again = case.run(moved), case.run(moved)
    assert_accurate(case, inputs, tuple(result.cpu() for result in results))
    for result, other in zip(results, again, strict=True):
        assert torch.equal(result.view(WORDS[result.dtype]), other.view(WORDS[result.dtype]))


@pytest.mark.cuda
@by_offset
@pytest.mark.parametrize("size", [1, 1023, 100_000])
def test_stochastic_rounding_has_the_bits_of_the_reference(size: int, offset: int) -> None:
    src = torch.randn(size)
    results = []
    for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
        dst = torch.empty(size, dtype=torch.bfloat16, device=device)
        with use_backend(backend, strict=True):
            results.append(stochastic_round_(dst, src.to(device), (1 << 64) - 3, offset).cpu().view(torch.int16))
    assert torch.equal(*results)


@pytest.mark.cuda
@by_offset
@by_gradient_dtype
@by_dtype
@pytest.mark.parametrize("size", [255, 4096, 10_001])
def test_adamw_has_the_bits_of_the_reference(
    size: int, dtype: torch.dtype, gradient_dtype: torch.dtype, offset: int
) -> None:
    parameter, steps = weights(size, dtype=dtype), gradients(3, size, dtype=gradient_dtype)
    expected = taken("reference", parameter, steps, offset=offset, gradient_scale=0.37)
    moved = taken("triton", parameter.to(DEVICE), [g.to(DEVICE) for g in steps], offset=offset, gradient_scale=0.37)
    results = [tuple(tensor.cpu() for tensor in result) for result in moved]
    assert_same_states(results, expected)
    for result, want in zip(results, expected, strict=True):
        assert torch.equal(result[0].view(WORDS[dtype]), want[0].view(WORDS[dtype]))


@pytest.mark.cuda
@by_case
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1009), (2, 4096)], ids=str)
def test_error_at_addresses_that_are_not_aligned(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = case.inputs(shape, dtype)
    moved = {}
    for name, value in inputs.items():
        memory = torch.empty(1 + value.numel(), dtype=value.dtype, device=DEVICE)
        moved[name] = memory[1:].view(value.shape).copy_(value)
    with use_backend("triton", strict=True):
        results = case.run(moved)
    assert_accurate(case, inputs, tuple(result.cpu() for result in results))


def marked() -> torch.Tensor:
    """`HUGE` ones of bfloat16, and other numbers where 32 bits might lead elsewhere."""
    values = torch.ones(HUGE, dtype=torch.bfloat16, device=DEVICE)
    for number, place in enumerate((0, 1008, HUGE // 2, HUGE - 1009, HUGE - 1)):
        values[place] = number + 2
    return values


@pytest.mark.cuda
@pytest.mark.large_gpu
def test_sums_of_more_than_32_bits_count() -> None:
    values, total = marked(), torch.zeros(HUGE, device=DEVICE)
    with use_backend("triton", strict=True):
        accumulate_(total, values)
        # Exact in bfloat16: no random bits round it.
        assert torch.equal(stochastic_round_(torch.zeros_like(values), total, seed=1, offset=0), values)


@pytest.mark.cuda
@pytest.mark.large_gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_latents_of_more_than_32_bits_count(batch: int) -> None:
    x = marked()[: HUGE // batch * batch].view(batch, -1)
    sigma_next = torch.arange(1.0, batch + 1, device=DEVICE)
    with use_backend("triton", strict=True):
        stepped = euler_step(x, torch.ones_like(x), torch.zeros_like(sigma_next), sigma_next)
    for row, (before, after) in enumerate(zip(x, stepped, strict=True)):
        assert torch.equal(after, before + (row + 1))


@pytest.mark.cuda
@pytest.mark.large_gpu
def test_adamw_on_more_elements_than_32_bits_count() -> None:
    """The end has the bits that it has on its own."""
    start = (HUGE - 1) // 4096 * 4096 - 4096
    hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 1, "seed": 7}
    gradient = marked()
    parameter, end = gradient.clone(), gradient[start:].clone()
    state, state_of_end = Adam8bitState.zeros_like(parameter), Adam8bitState.zeros_like(end)
    with use_backend("triton", strict=True):
        adamw_8bit_step_(end, gradient[start:], state_of_end, **hyper, offset=start)
        adamw_8bit_step_(parameter, gradient, state, **hyper, offset=0)
    assert torch.equal(parameter[start:].view(torch.int16), end.view(torch.int16))
    assert torch.equal(state.state1[start:], state_of_end.state1)
    assert torch.equal(state.absmax2[start // 256 :], state_of_end.absmax2)
