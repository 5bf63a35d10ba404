"""What holds for every op on every backend: its error, and that no memory layout is read wrongly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
import hashlib, sys, torch
import kernel_cases
from leap_kernels import Adam8bitState, _native, adamw_8bit_step_, stochastic_round_, use_backend
torch.manual_seed(0)
digest = hashlib.sha256()
with use_backend("native", strict=True):
    for case in kernel_cases.CASES.values():
        for dtype in kernel_cases.HALVES_AND_FLOAT:
            for result in case.run(case.inputs((2, 9001), dtype)):
                digest.update(result.view(kernel_cases.WORDS[result.dtype]).numpy().tobytes())
    rounded = stochastic_round_(torch.empty(9001, dtype=torch.bfloat16), torch.randn(9001), 5, 3)
    digest.update(rounded.view(torch.int16).numpy().tobytes())
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.randn(9001).to(dtype)
        state = Adam8bitState.zeros_like(parameter)
        numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "seed": 5, "offset": 3}
        for step in (1, 2, 3):
            adamw_8bit_step_(parameter, torch.randn(9001), state, step=step, **numbers)
        for result in (parameter.view(kernel_cases.WORDS[dtype]), *state.tensors()):
            digest.update(result.numpy().tobytes())
print(_native.describe().split(",")[1].strip(), digest.hexdigest())
"""


@pytest.mark.native
def test_native_bits_do_not_depend_on_the_instruction_set() -> None:
    printed = []
    here = Path(__file__).parent
    shared = os.pathsep.join(map(str, (here, here.parent / "support")))
    for isa in ("baseline", "avx2", "avx512"):
        environment = {**os.environ, "LEAP_NATIVE_ISA": isa, "PYTHONPATH": shared}
        done = subprocess.run(
            [sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.split())
    assert printed[0][0] == "baseline"
    assert len({digest for _, digest in printed}) == 1
