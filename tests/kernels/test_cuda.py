"""Every op on a CUDA device, its Triton kernels compiled and run, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from adamw_cases import assert_same_states, by_dtype, by_gradient_dtype, gradients, taken, weights
from kernel_cases import CASES, HALVES_AND_FLOAT, SHAPES, WORDS, Case, assert_accurate, by_case
from leap_kernels import stochastic_round_, use_backend
from leap_kernels._catalog import OPS

DEVICE = "cuda"
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
