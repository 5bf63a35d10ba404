from __future__ import annotations

import pytest
import torch
from group_norm_cases import (
    SHAPES,
    assert_accurate,
    by_shape,
    channels_last,
    differentiated,
    eager,
    in_double,
    inputs,
)
from kernel_cases import BACKENDS, WORDS, latents
from leap_kernels import group_norm_silu, use_backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

by_backend = pytest.mark.parametrize("backend", BACKENDS)
KINDS = [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True), (torch.float16, True)]
"""Dtypes, and whether weight and bias are given."""
SLOW = "longer-than-a-program"
"""In Triton's interpreter."""


@pytest.mark.parametrize(
    ("name", "dtype", "affine"),
    [(name, *kind) for name in SHAPES for kind in (KINDS[2:3] if name == SLOW else KINDS)],
    ids=str,
)
@by_backend
def test_error_against_float64(name: str, backend: str, dtype: torch.dtype, affine: bool) -> None:
    shape, groups = SHAPES[name]
    given = inputs(shape, dtype, affine)
    layouts = [given, channels_last(given)] if len(shape) == 4 else [given]
    for layout in layouts:
        with use_backend(backend, strict=True):
            results = differentiated(group_norm_silu, layout, groups)
        assert_accurate(given, groups, results, cut=backend == "triton" and dtype == torch.bfloat16)


@by_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_pytorch(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    given = inputs((2, 8, 16, 16), dtype)
    with use_backend(backend, strict=True):
        results = differentiated(group_norm_silu, given, 4)
    theirs = differentiated(eager, given, 4)
    for name, exact in differentiated(eager, in_double(given), 4).items():
        ours, other = ((value[name].double() - exact).square().mean().sqrt() for value in (results, theirs))
        assert ours <= 1.05 * other, name


@by_backend
@pytest.mark.parametrize("last", [False, True])
def test_a_large_mean_costs_no_digits(backend: str, last: bool) -> None:
    given = inputs((1, 4, 37, 31), torch.float32) | {"x": latents(1, 4, 37, 31).add(1000).float()}
    with use_backend(backend, strict=True):
        result = differentiated(group_norm_silu, channels_last(given) if last else given, 2)
    exact = differentiated(eager, in_double(given), 2)
    torch.testing.assert_close(result["out"].double(), exact["out"], rtol=0, atol=2e-3)


@by_backend
def test_memory_formats_are_kept(backend: str) -> None:
    given = inputs((2, 8, 5, 3), torch.float32)
    plain = differentiated(group_norm_silu, given, 4)
    last = channels_last(given)
    transposed = {n: x.transpose(2, 3).contiguous().transpose(2, 3) if x.ndim == 4 else x for n, x in given.items()}
    expanded = given | {"grad": torch.ones(()).expand(2, 8, 5, 3)}
    with use_backend(backend):
        for layout in (last, transposed, given | {"grad": last["grad"]}, last | {"grad": given["grad"]}):
            for name, value in differentiated(group_norm_silu, layout, 4).items():
                torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-5)
        kept = group_norm_silu(last["x"], 4)
        ones = differentiated(group_norm_silu, given | {"grad": torch.ones(2, 8, 5, 3)}, 4)
        for name, value in differentiated(group_norm_silu, expanded, 4).items():
            torch.testing.assert_close(value, ones[name], rtol=1e-5, atol=1e-5)
    assert kept.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_the_reference(affine: bool) -> None:
    given = inputs((2, 4, 2, 3), torch.float64, affine)
    leaves = [value.requires_grad_() for name, value in given.items() if name != "grad"]
    assert torch.autograd.gradcheck(lambda x, *rest: group_norm_silu(x, 2, *rest), leaves)


@by_backend
def test_saves_x_and_two_numbers_a_group_and_no_more(backend: str) -> None:
    given = inputs((2, 8, 4, 4), torch.bfloat16)
    leaves = {name: value.requires_grad_(name == "x") for name, value in given.items() if name != "grad"}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with use_backend(backend, strict=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = group_norm_silu(leaves["x"], 4, leaves["weight"], leaves["bias"])
    assert leaves["x"].data_ptr() in saved
    assert sum(saved.values()) == sum(value.nbytes for value in leaves.values()) + 2 * 2 * 4 * 4
    out.backward(given["grad"])
    assert leaves["x"].grad is not None
    assert leaves["weight"].grad is None


@pytest.mark.native
@by_shape
@pytest.mark.parametrize("last", [False, True])
def test_native_bits_do_not_depend_on_threads(shape, groups: int, last: bool) -> None:
    given = inputs((3 * shape[0], *shape[1:]), torch.bfloat16)
    given = channels_last(given) if last else given
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with use_backend("native", strict=True):
            results.append(differentiated(group_norm_silu, given, groups))
    torch.set_num_threads(1)
    for name, value in results[0].items():
        assert torch.equal(value.view(WORDS[value.dtype]), results[1][name].view(WORDS[value.dtype])), name


@pytest.mark.parametrize("last", [False, True])
def test_fake_tensors_have_the_shapes_of_real_ones(last: bool) -> None:
    given = inputs((2, 8, 5, 3), torch.bfloat16)
    given = channels_last(given) if last else given
    with FakeTensorMode() as mode:
        fakes = differentiated(group_norm_silu, {n: mode.from_tensor(value) for n, value in given.items()}, 4)
    for name, real in differentiated(group_norm_silu, given, 4).items():
        assert (fakes[name].shape, fakes[name].stride()) == (real.shape, real.stride()), name
        assert fakes[name].dtype == real.dtype


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 6, 3)
    for arguments, message in (
        ((torch.zeros(3), 1), "x"),
        ((x.long(), 2), "int64"),
        ((x, 4), "num_groups"),
        ((x, 2, torch.zeros(2)), "weight"),
        ((x, 2, None, torch.zeros(2)), "bias"),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm_silu(*arguments)
    grad = torch.autograd.grad(group_norm_silu(x.requires_grad_(), 2).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
