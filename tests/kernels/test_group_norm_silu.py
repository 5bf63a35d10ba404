from __future__ import annotations

import pytest
import tolerances
import torch
from isa import hash_on_every_isa
from kernel_cases import BACKENDS, HALVES_AND_FLOAT, WORDS, latents
from leap_kernels import group_norm_silu, use_backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import group_norm, silu

by_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = {
    "one-element-a-sample": ((2, 1, 1, 1), 1),
    "no-places": ((3, 6), 3),
    "narrow": ((2, 6, 3, 5), 2),
    "groups-of-one": ((2, 5, 3, 3), 5),
    "image": ((2, 64, 9, 7), 32),
    "longer-than-a-block": ((1, 2, 91, 97), 1),
    "longer-than-a-program": ((1, 4, 183, 181), 2),
    "video": ((1, 8, 2, 3, 5), 4),
}
by_shape = pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES)
Inputs = dict[str, Tensor]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, affine: bool = True) -> Inputs:
    x = latents(*shape).mul(0.7).add(0.4).to(dtype)
    drawn = {"x": x, "grad": latents(*shape, dtype=dtype)}
    names = ("weight", "bias") if affine else ()
    return drawn | {name: latents(shape[1], dtype=dtype) for name in names}


def channels_last(given: Inputs) -> Inputs:
    return {n: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for n, x in given.items()}


def eager(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return silu(group_norm(x, groups, weight, bias, 1e-6))


def differentiated(function, given: Inputs, groups: int) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in given.items() if name != "grad"}
    out = function(leaves["x"], groups, leaves.get("weight"), leaves.get("bias"))
    grads = torch.autograd.grad(out, list(leaves.values()), given["grad"])
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def in_double(given: Inputs) -> Inputs:
    return {name: value.double() for name, value in given.items()}


@by_shape
@by_backend
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_error_against_float64(shape, groups: int, backend: str, dtype: torch.dtype, affine: bool) -> None:
    given = inputs(shape, dtype, affine)
    layouts = [given, channels_last(given)] if backend != "native" and len(shape) == 4 else [given]
    exacts = differentiated(eager, in_double(given), groups)
    size = given["x"].numel() // shape[0] // groups
    deviation = given["x"].double().reshape(shape[0] * groups, -1).var(dim=1, correction=0).add(1e-6).sqrt()
    normed = given["x"].double().abs().max().item() / deviation.min().item()
    weight = given["weight"].abs().max().item() if affine else 1.0
    magnitude = 4 * max(1.0, normed) * max(1.0, weight) * max(1.0, given["grad"].abs().max().item())
    for layout in layouts:
        with use_backend(backend, strict=True):
            results = differentiated(group_norm_silu, layout, groups)
        for name, exact in exacts.items():
            terms = shape[0] * given["x"].numel() // (shape[0] * shape[1]) if name in ("weight", "bias") else size
            scale = magnitude * {"out": 1.0, "x": 1 / deviation.min().item()}.get(name, terms**0.5)
            arithmetic, storage = tolerances.largest(exact, scale, terms, dtype, dtype)
            cut = backend == "triton" and dtype == torch.bfloat16
            assert results[name].dtype == dtype
            error = (results[name].double() - exact).abs().max().item()
            assert error <= arithmetic + (2 if cut else 1) * storage, name


@by_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_pytorch(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    given = inputs((2, 64, 16, 16), dtype)
    with use_backend(backend, strict=True):
        results = differentiated(group_norm_silu, given, 32)
    theirs = differentiated(eager, given, 32)
    for name, exact in differentiated(eager, in_double(given), 32).items():
        ours, other = ((value[name].double() - exact).square().mean().sqrt() for value in (results, theirs))
        assert ours <= 1.05 * other, name


@by_backend
def test_a_large_mean_costs_no_digits(backend: str) -> None:
    given = inputs((1, 4, 37, 31), torch.float32) | {"x": latents(1, 4, 37, 31).add(1000).float()}
    with use_backend(backend, strict=True):
        result = differentiated(group_norm_silu, given, 2)
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
    given = inputs((2, 64, 8, 8), torch.bfloat16)
    leaves = {name: value.requires_grad_(name == "x") for name, value in given.items() if name != "grad"}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with use_backend(backend, strict=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = group_norm_silu(leaves["x"], 32, leaves["weight"], leaves["bias"])
    assert leaves["x"].data_ptr() in saved
    assert sum(saved.values()) == sum(value.nbytes for value in leaves.values()) + 2 * 2 * 32 * 4
    out.backward(given["grad"])
    assert leaves["x"].grad is not None
    assert leaves["weight"].grad is None


@pytest.mark.native
@by_shape
def test_native_bits_do_not_depend_on_threads(shape, groups: int) -> None:
    given = inputs((3 * shape[0], *shape[1:]), torch.bfloat16)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with use_backend("native", strict=True):
            results.append(differentiated(group_norm_silu, given, groups))
    torch.set_num_threads(1)
    for name, value in results[0].items():
        assert torch.equal(value.view(WORDS[value.dtype]), results[1][name].view(WORDS[value.dtype])), name


BITS = """
from leap_kernels import group_norm_silu
from test_group_norm_silu import SHAPES, differentiated, inputs
results = [
    result
    for shape, groups in SHAPES.values()
    for dtype in kernel_cases.HALVES_AND_FLOAT
    for result in differentiated(group_norm_silu, inputs(shape, dtype), groups).values()
]
"""


@pytest.mark.native
def test_native_bits_do_not_depend_on_the_instruction_set() -> None:
    assert len(hash_on_every_isa(BITS)) == 1


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
