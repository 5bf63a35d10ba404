"""What holds for every op on every backend: its error, and that no memory layout is read wrongly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isa import hash_on_every_isa
from kernel_cases import BACKENDS, HALVES_AND_FLOAT, LAYOUTS, SHAPES, WORDS, Case, assert_accurate, by_case
from leap_kernels import use_backend

by_backend = pytest.mark.parametrize("backend", BACKENDS)
shapes = st.one_of(
    st.sampled_from(list(SHAPES.values())), st.lists(st.integers(1, 30), min_size=1, max_size=3).map(tuple)
)


@by_case
@by_backend
@settings(max_examples=12)
@given(dtype=st.sampled_from(HALVES_AND_FLOAT), shape=shapes)
def test_error_against_float64(case: Case, backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = case.inputs(shape, dtype)
    with use_backend(backend, strict=True):
        results = case.run(inputs)
    # Triton's interpreter (not its compiler) cuts bfloat16 off instead of rounding it.
    assert_accurate(case, inputs, results, cut=backend == "triton")


@by_case
@by_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides_and_contiguous_results(case: Case, backend: str, layout) -> None:
    inputs = case.inputs((3, 8, 9), torch.float32)
    latents = {name: layout(inputs[name]) for name in (*case.latents, "grad")}
    with use_backend(backend, strict=True):
        strided = case.run(inputs | latents)
        plain = case.run(inputs | {name: value.contiguous() for name, value in latents.items()})
    for position, (got, want) in enumerate(zip(strided, plain, strict=True)):
        # The gradient at x is handed on as it came.
        if position < len(strided) - len(case.differentiable) and not case.returns_argument:
            assert got.is_contiguous()
        # PyTorch may add a strided tensor in another order.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@by_case
def test_gradients_of_the_reference(case: Case) -> None:
    """In float64: those of the formula, and where they should be, the derivative."""
    inputs = case.inputs((2, 3, 2), torch.float64)
    ours, autograd = case.run(inputs), case.run(inputs, formula=True)
    for got, want in zip(ours, autograd, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-6, atol=1e-7)
    leaves = [inputs[name].double().requires_grad_() for name in case.differentiable]
    fixed = {name: value for name, value in inputs.items() if name not in (*case.differentiable, "grad")}
    if leaves and not case.surrogate:
        assert torch.autograd.gradcheck(
            lambda *leaves: case.op(**fixed, **dict(zip(case.differentiable, leaves, strict=True)))[0], leaves
        )


@pytest.mark.native
@by_case
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_native_bits_do_not_depend_on_threads(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs((3, 50_021), dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with use_backend("native", strict=True):
            results.append(case.run(inputs))
    torch.set_num_threads(1)
    for others in results[1:]:
        for got, want in zip(others, results[0], strict=True):
            assert torch.equal(got.view(WORDS[got.dtype]), want.view(WORDS[want.dtype]))


BITS = """
import block_cases, group_norm_cases, norm_rope_cases
from leap_kernels import Adam8bitState, adamw_8bit_step_, group_norm_silu, stochastic_round_

results = [stochastic_round_(torch.empty(9001, dtype=torch.bfloat16), torch.randn(9001), 5, 3)]
for dtype in kernel_cases.HALVES_AND_FLOAT:
    for case in kernel_cases.CASES.values():
        results.extend(case.run(case.inputs((2, 9001), dtype)))
    for case in block_cases.BLOCK_CASES.values():
        results.extend(case.run(case.inputs((2, 37, 333), dtype)))
    for case in norm_rope_cases.CASES.values():
        results.extend(norm_rope_cases.differentiated(norm_rope_cases.call, case.inputs(dtype), case.layout).values())
    for shape, groups in group_norm_cases.SHAPES.values():
        given = group_norm_cases.inputs(shape, dtype)
        results.extend(group_norm_cases.differentiated(group_norm_silu, given, groups).values())
for dtype in (torch.float32, torch.bfloat16):
    parameter = torch.randn(9001).to(dtype)
    state = Adam8bitState.zeros_like(parameter)
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "seed": 5, "offset": 3}
    for step in (1, 2, 3):
        adamw_8bit_step_(parameter, torch.randn(9001), state, step=step, **numbers)
    results.extend([parameter, *state.tensors()])
"""


@pytest.mark.slow
@pytest.mark.native
def test_native_bits_do_not_depend_on_the_instruction_set() -> None:
    assert len(hash_on_every_isa(BITS)) == 1
