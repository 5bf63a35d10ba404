"""The ops of transformer blocks: their errors, gradients and layouts."""

from __future__ import annotations

import sys

import pytest
import torch
from block_cases import BLOCK_CASES, HALVES_AND_FLOAT, SHAPES, BlockCase, assert_accurate, by_block_case
from kernel_cases import BACKENDS, LAYOUTS, WORDS
from leap_kernels import use_backend
from leap_kernels._modulation import SUMMED_STRIP, strided, summed_strip
from leap_kernels.adaln_modulate import LONGEST, adaln_modulate
from leap_kernels.gated_residual import gated_residual
from leap_kernels.gelu_tanh import gelu_tanh
from leap_kernels.swiglu import row_stride, swiglu

by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)


@by_block_case
@by_backend
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in SHAPES),
        *((shape, dtype) for shape in SHAPES[2:4] for dtype in HALVES_AND_FLOAT[1:]),
    ],
    ids=str,
)
def test_error_against_float64(case: BlockCase, backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = case.inputs(shape, dtype)
    with use_backend(backend, strict=True):
        results = case.run(inputs)
    # Triton's interpreter (not its compiler) cuts bfloat16 off instead of rounding it.
    assert_accurate(case, inputs, results, cut=backend == "triton" and dtype == torch.bfloat16)


@by_block_case
@by_backend
@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_vectors_may_have_another_dtype(case: BlockCase, backend: str, dtype: torch.dtype, other: torch.dtype) -> None:
    if not case.vectors:
        pytest.skip("takes no vectors")
    inputs = case.inputs((2, 19, 70), dtype, other, ones=False)
    with use_backend(backend, strict=True):
        results = case.run(inputs)
    assert_accurate(case, inputs, results, cut=backend == "triton")


@by_backend
def test_dtypes_that_all_differ(backend: str) -> None:
    x, scale, shift = torch.randn(2, 3, 40), torch.randn(2, 40).bfloat16(), torch.randn(2, 40).half()
    leaves = [tensor.requires_grad_() for tensor in (x, scale, shift)]
    with use_backend(backend, strict=True):
        modulated = adaln_modulate(x, shift, scale)
        gated = gated_residual(x.bfloat16(), scale, x)
        grads = torch.autograd.grad(modulated.sum() + gated.sum(), leaves)
    assert [modulated.dtype, gated.dtype, *(grad.dtype for grad in grads)] == [
        *(torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)
    ]
    torch.testing.assert_close(grads[2].float(), torch.full((2, 40), 3.0))


@by_block_case
@by_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(case: BlockCase, backend: str, layout) -> None:
    inputs = case.inputs((3, 8, 10), torch.float32)
    strided_rows = {name: layout(inputs[name]) for name in (*case.rows, "grad")}
    with use_backend(backend, strict=True):
        got = case.run(inputs | strided_rows)
        want = case.run(inputs | {name: value.contiguous() for name, value in strided_rows.items()})
    assert got[0].is_contiguous()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@by_backend
def test_more_and_fewer_dimensions(backend: str) -> None:
    x, vectors = torch.randn(2, 3, 4, 33), torch.randn(2, 66)
    shift, scale = vectors.chunk(2, dim=-1)
    with use_backend(backend, strict=True):
        flat = adaln_modulate(x.flatten(1, 2), shift, scale)
        assert torch.equal(adaln_modulate(x, shift[:, None, None], scale[:, None, None]), flat.view_as(x))
        assert torch.equal(adaln_modulate(x[:, 0, 0], shift, scale), flat[:, 0])
        assert torch.equal(
            gated_residual(x, scale, x), gated_residual(x.flatten(1, 2), scale, x.flatten(1, 2)).view_as(x)
        )
        # A vector for each token: tokens are the batch.
        tokens = x.reshape(24, 33)
        assert torch.equal(gated_residual(tokens, tokens, tokens), (tokens + tokens * tokens))


def test_chunks_are_not_copied() -> None:
    wide = torch.randn(3, 4, 30)
    chunk = wide.chunk(3, dim=-1)[1]
    assert row_stride(chunk) == 30
    assert row_stride(wide[:, :1].chunk(3, dim=-1)[1]) == 120
    assert row_stride(wide[:, 1:]) is None
    assert row_stride(wide.transpose(1, 2)) is None
    vector, stride = strided(wide[:, 0].chunk(3, dim=-1)[2])
    assert (vector.data_ptr(), stride) == (wide[0, 0, 20:].data_ptr(), 120)


@by_block_case
def test_gradcheck(case: BlockCase) -> None:
    inputs = case.inputs((2, 3, 4), torch.float64)
    names = [name for name in inputs if name != "grad"]
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *leaves: case.op(**dict(zip(names, leaves, strict=True))), leaves)


@by_block_case
@by_backend
def test_each_gradient_alone(case: BlockCase, backend: str) -> None:
    inputs = case.inputs((2, 5, 33), torch.float32)
    grad = inputs.pop("grad")
    with use_backend(backend, strict=True):
        _, *together = case.run(inputs | {"grad": grad})
        for name, want in zip(inputs, together, strict=True):
            leaves = {key: value.detach().requires_grad_(key == name) for key, value in inputs.items()}
            (got,) = torch.autograd.grad(case.op(**leaves), leaves[name], grad)
            assert torch.equal(got, want)


@by_block_case
@by_backend
def test_same_bits_every_time(case: BlockCase, backend: str) -> None:
    inputs = case.inputs((2, 19, 70), torch.bfloat16)
    with use_backend(backend, strict=True):
        first, second = case.run(inputs), case.run(inputs)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual"])
def test_sums_over_long_strips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As programs make them where there are many rows."""
    monkeypatch.setattr(sys.modules[f"leap_kernels.{name}"], "summed_strip", lambda *_: SUMMED_STRIP)
    case = BLOCK_CASES[name]
    inputs = case.inputs((2, SUMMED_STRIP + 5, 33), torch.float32)
    with use_backend("triton", strict=True):
        assert_accurate(case, inputs, case.run(inputs))


def test_small_tensors_are_summed_in_short_strips() -> None:
    assert summed_strip(1, 4608) < SUMMED_STRIP == summed_strip(8, 4608) == summed_strip(2, 4608, 3)


@pytest.mark.native
@by_block_case
@by_dtype
def test_native_bits_do_not_depend_on_threads(case: BlockCase, dtype: torch.dtype) -> None:
    inputs = case.inputs((2, 101, 260), dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with use_backend("native", strict=True):
            results.append(case.run(inputs))
    torch.set_num_threads(1)
    for others in results[1:]:
        for got, want in zip(others, results[0], strict=True):
            assert torch.equal(got.view(WORDS[dtype]), want.view(WORDS[dtype]))


@by_backend
@pytest.mark.parametrize("function", [gelu_tanh, lambda x: swiglu(x, torch.ones_like(x))], ids=["gelu", "silu"])
def test_activations_far_from_zero(backend: str, function) -> None:
    ends = torch.tensor([-1e9, -200.0, -90.0, -30.0, -0.0, 30.0, 200.0, 1e9], requires_grad=True)
    with use_backend(backend, strict=True):
        values = function(ends)
        (slopes,) = torch.autograd.grad(values.sum(), ends)
        assert function(torch.full((33,), torch.nan)).isnan().all()
    torch.testing.assert_close(values, ends.clamp(min=0), rtol=0, atol=1e-11)
    torch.testing.assert_close(slopes[[0, 1, 2, 3, 5, 6, 7]], (ends[[0, 1, 2, 3, 5, 6, 7]] > 0).float())
    assert slopes[4] == 0.5


def test_rows_of_a_large_mean() -> None:
    """The variance is that around the mean, not a difference of large numbers."""
    x, zero = torch.randn(1, 4, 500) + 1000, torch.zeros(1, 500)
    exact = torch.nn.functional.layer_norm(x.double(), (500,), eps=1e-6)
    for backend in ("reference", "native"):
        with use_backend(backend):
            torch.testing.assert_close(adaln_modulate(x, zero, zero).double(), exact, rtol=0, atol=5e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["adaln_modulate", "adaln_modulate/no_shift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_too_wide_for_a_program(name: str, dtype: torch.dtype) -> None:
    """They are read block by block; of the last block little is inside."""
    case = BLOCK_CASES[name]
    inputs = case.inputs((2, 19, LONGEST + 3), dtype)
    inputs["x"] += 3 * torch.arange(LONGEST + 3).sub(LONGEST / 2).div(LONGEST).to(dtype)
    with use_backend("triton", strict=True):
        assert_accurate(case, inputs, case.run(inputs), cut=dtype == torch.bfloat16)


@pytest.mark.interpreter
def test_wide_rows_of_a_large_mean_and_each_gradient_alone() -> None:
    x, zero = (torch.randn(1, 2, 3 * 4096) + 1000).requires_grad_(), torch.zeros(1, 3 * 4096)
    exact = torch.nn.functional.layer_norm(x.double(), x.shape[-1:], eps=1e-6)
    with use_backend("triton", strict=True):
        y = adaln_modulate(x, zero, zero)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=5e-4)
        (alone,) = torch.autograd.grad(y, x, x.detach(), retain_graph=True)
        scale = zero.clone().requires_grad_()
        together, _ = torch.autograd.grad(adaln_modulate(x, zero, scale), (x, scale), x.detach())
    assert torch.equal(alone, together)


def test_wrong_arguments_are_named() -> None:
    x, vector = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    for call, words in (
        (lambda: adaln_modulate(x, vector, vector[:1]), "scale of shape"),
        (lambda: adaln_modulate(x, x, vector), "shift of shape"),
        (lambda: adaln_modulate(x, vector[:, None], vector), "one shape"),
        (lambda: adaln_modulate(x[:, :0], vector, vector), "at least one element"),
        (lambda: adaln_modulate(x.int(), vector, vector), "float32"),
        (lambda: adaln_modulate(x, vector, vector.int()), "float32"),
        (lambda: gated_residual(x, vector, x[:, :1]), "x and y alike"),
        (lambda: gated_residual(x, x, x), "each token"),
        (lambda: gated_residual(x, vector, x.int()), "float32"),
        (lambda: gelu_tanh(x.int()), "float32"),
        (lambda: gelu_tanh(x[:0]), "at least one element"),
        (lambda: swiglu(x, x.half()), "gate and up alike"),
        (lambda: swiglu(x[..., :3]), "even last dimension"),
        (lambda: swiglu(x[..., :0]), "at least one element"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
