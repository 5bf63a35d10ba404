"""Every op on a CUDA device, its Triton kernels compiled and run, against the reference on the CPU."""

from __future__ import annotations

import block_cases
import group_norm_cases
import norm_rope_cases
import pytest
import torch
from adamw_cases import SETTINGS, assert_same_states, by_dtype, by_gradient_dtype, gradients, taken, weights
from kernel_cases import CASES, HALVES_AND_FLOAT, SHAPES, WORDS, Case, assert_accurate, by_case
from leap_kernels import (
    Adam8bitState,
    accumulate_,
    adamw_8bit_step_,
    adamw_8bit_step_many_,
    euler_step,
    group_norm_silu,
    stochastic_round_,
    total_norm,
    use_backend,
)
from leap_kernels._adamw_8bit import factors_of
from leap_kernels._catalog import OPS
from leap_kernels.adamw_8bit_step_many import Job, _kind, _table, launch
from tolerances import unit_roundoff

DEVICE = "cuda"
HUGE = (1 << 31) + 1009
"""Elements, more than 32 bits of a signed number count."""
by_offset = pytest.mark.parametrize("offset", [0, 8, 5, (1 << 62) + 3])


def test_no_op_is_left_out() -> None:
    here = {"adamw_8bit_step_", "adamw_8bit_step_many_", "stochastic_round_", "total_norm"}
    in_blocks = {name.partition("/")[0] for name in block_cases.BLOCK_CASES} | {"group_norm_silu", "qk_norm_rope"}
    assert {name.partition("/")[0] for name in CASES} | here | in_blocks == {op.name for op in OPS}


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


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


@pytest.mark.cuda
@block_cases.by_block_case
@pytest.mark.parametrize("vectors", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("shape", [*block_cases.SHAPES, (2, 300, 3072), (2, 19, 8195)], ids=str)
def test_error_of_blocks(
    case: block_cases.BlockCase, shape: tuple[int, int, int], dtype: torch.dtype, vectors: torch.dtype | None
) -> None:
    """Of outputs and gradients; the same bits when run again."""
    inputs = case.inputs(shape, dtype, vectors)
    moved = on_device(inputs)
    with use_backend("triton", strict=True):
        results, again = case.run(moved), case.run(moved)
    block_cases.assert_accurate(case, inputs, tuple(result.cpu() for result in results))
    for result, other in zip(results, again, strict=True):
        assert torch.equal(result, other)


@pytest.mark.cuda
@block_cases.by_block_case
def test_sums_over_long_strips_of_rows(case: block_cases.BlockCase) -> None:
    """Of so many rows that a program takes 64."""
    inputs = case.inputs((2, 8200, 96), torch.float32)
    with use_backend("triton", strict=True):
        results = case.run(on_device(inputs))
    exacts = case.run({name: value.double() for name, value in inputs.items()}, formula=True)
    for result, exact in zip(results, exacts, strict=True):
        error = (result.cpu().double() - exact).abs().max().item()
        assert error <= 100 * unit_roundoff(torch.float32) * (1 + exact.abs().max().item())


@pytest.mark.cuda
@norm_rope_cases.by_case
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_error_of_queries_and_keys(case: norm_rope_cases.Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    with use_backend("triton", strict=True):
        plain, heads_first = (
            norm_rope_cases.differentiated(norm_rope_cases.call, on_device(laid_out), case.layout)
            for laid_out in (inputs, norm_rope_cases.heads_first(inputs))
        )
    for results in (plain, heads_first):
        norm_rope_cases.assert_accurate(case, inputs, {name: value.cpu() for name, value in results.items()})


@pytest.mark.cuda
@group_norm_cases.by_shape
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_error_of_group_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype, affine: bool) -> None:
    given = group_norm_cases.inputs(shape, dtype, affine)
    for layout in (given, group_norm_cases.channels_last(given)):
        with use_backend("triton", strict=True):
            results = group_norm_cases.differentiated(group_norm_silu, on_device(layout), groups)
        group_norm_cases.assert_accurate(given, groups, {name: value.cpu() for name, value in results.items()})


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


def many(device: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Adam8bitState]]:
    """The same parameters on any device, with gradients and states."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator) for size in (1, 16, 255, 4096, 10_001) for _ in range(4)]
    dtypes = (torch.float32, torch.bfloat16)
    parameters = [values.to(device, dtypes[number % 2]) for number, values in enumerate(drawn)]
    of_each = [(values / 7).to(device, dtypes[number // 2 % 2]) for number, values in enumerate(drawn)]
    return parameters, of_each, [Adam8bitState.zeros_like(parameter) for parameter in parameters]


@pytest.mark.cuda
def test_adamw_of_many_has_the_bits_of_the_reference() -> None:
    numbers = {name: value for name, value in SETTINGS.items() if name != "offset"} | {"gradient_scale": 0.37}
    results = []
    for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
        parameters, of_each, states = many(device)
        with use_backend(backend, strict=True):
            for step in (1, 2):
                steps, offsets = [step] * len(parameters), [5 * number for number in range(len(parameters))]
                adamw_8bit_step_many_(parameters, of_each, states, **numbers, steps=steps, offsets=offsets)
        results.append([*parameters, *(tensor for state in states for tensor in state.tensors())])
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.cuda
def test_a_graph_holds_the_launch_of_many_steps() -> None:
    """As often as it is replayed it takes the step with the numbers that are in its table."""
    factors = factors_of(1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 0.37)
    results = []
    for captured in (False, True):
        parameters, of_each, states = many(DEVICE)
        jobs = [Job(*each, factors, 7, 8) for each in zip(parameters, of_each, states, strict=True)]
        of_kind = [job for job in jobs if _kind(job) == _kind(jobs[-1])]
        table, kind = _table(of_kind), _kind(jobs[-1])[2:]
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch(of_kind[0], table, *kind)
            graph.replay()
            graph.replay()
        else:
            launch(of_kind[0], table, *kind)
            launch(of_kind[0], table, *kind)
        results.append(parameters)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.cuda
def test_total_norm_against_float64() -> None:
    _, of_each, _ = many(DEVICE)
    exact = torch.cat([gradient.double() for gradient in of_each]).norm().item()
    with use_backend("triton", strict=True):
        assert total_norm(of_each).item() == pytest.approx(exact, rel=1e-6)
