from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BACKENDS, HALVES_AND_FLOAT, LAYOUTS, SHAPES, latents, sigmas
from leap_kernels import leap_update, use_backend
from leap_kernels.leap_update import (
    native_backward,
    native_forward,
    reference_backward,
    reference_forward,
)
from torch import Tensor

by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)


def exact(x: Tensor, velocity: Tensor, sigma_from: Tensor, sigma_to: Tensor) -> tuple[Tensor, Tensor]:
    """Return xhat in float64, written out per sample, and a bound on all intermediate values."""
    rows = [
        (xb - (float(a) - float(b)) * vb, xb.abs() + abs(float(a) - float(b)) * vb.abs())
        for xb, vb, a, b in zip(x.double(), velocity.double(), sigma_from, sigma_to, strict=True)
    ]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def per_sample_mean(x: Tensor) -> Tensor:
    return torch.stack([sample.mean() for sample in x])


def check_against_exact(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, velocity, target, grad = (latents(*shape, dtype=dtype) for _ in range(4))
    sigma_from, sigma_to = sigmas(shape[0])
    xhat, magnitude = exact(x, velocity, sigma_from, sigma_to)
    count = x[0].numel()
    cut = backend == "triton" and x.device.type == "cpu" and dtype == torch.bfloat16
    x.requires_grad_(), velocity.requires_grad_()

    with use_backend(backend, strict=True):
        leapt, nothing = leap_update(x, velocity, sigma_from, sigma_to)
        pinned, distance = leap_update(x, velocity, sigma_from, sigma_to, target)
    assert nothing is None
    assert leapt.dtype == pinned.dtype == dtype
    assert leapt.shape == pinned.shape == shape
    allowed = tolerances.elementwise(xhat, magnitude, dtype, operations=3, cut=cut)
    assert ((leapt.double() - xhat).abs() <= allowed).all()

    assert torch.equal(pinned, target)
    assert distance.dtype == torch.float32
    assert distance.shape == shape[:1]
    assert not distance.requires_grad
    expected = per_sample_mean((target.double() - xhat).abs())
    bound = tolerances.reduction(per_sample_mean(magnitude + target.double().abs()), count, dtype, 4)
    assert ((distance.double() - expected).abs() <= bound).all()

    expected_grad = torch.stack([(b - a) * g for a, b, g in zip(sigma_from, sigma_to, grad.double(), strict=True)])
    allowed = tolerances.elementwise(expected_grad, expected_grad.abs(), dtype, operations=2, cut=cut)
    for output in (leapt, pinned):
        grad_x, grad_velocity = torch.autograd.grad(output, (x, velocity), grad)
        assert torch.equal(grad_x, grad)
        assert grad_velocity.dtype == dtype
        assert ((grad_velocity.double() - expected_grad).abs() <= allowed).all()


@by_backend
@by_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_against_exact(backend, dtype, shape)


@by_backend
@given(
    dtype=st.sampled_from(HALVES_AND_FLOAT),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
)
def test_matches_float64_on_any_shape(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_against_exact(backend, dtype, shape)


def test_reference_gradient_is_the_derivative() -> None:
    x, velocity = latents(3, 4, 5).requires_grad_(), latents(3, 4, 5).requires_grad_()
    a, b = (s.double() for s in sigmas(3))
    assert torch.autograd.gradcheck(lambda x, v: leap_update(x, v, a, b)[0], (x, velocity))


def test_reference_backward_is_autograd_of_reference_forward() -> None:
    x, velocity, grad = latents(3, 7), latents(3, 7).requires_grad_(), latents(3, 7)
    delta = sigmas(3)[0].double()
    by_autograd = torch.autograd.grad(reference_forward(x, velocity, delta, None)[0], velocity, grad)[0]
    assert torch.equal(reference_backward(grad, delta, torch.float64), by_autograd)


@by_backend
def test_connector_has_the_gradient_of_the_written_out_graph(backend: str) -> None:
    """Two leaps of a LeapAlign trajectory, against plain autograd over the formulas of the paper."""
    shape, a, b = (2, 6, 5), torch.tensor([0.9, 0.7]), torch.tensor([0.4, 0.1])
    x_k, x_j, x_end, weight = (latents(*shape, dtype=torch.float32) for _ in range(4))
    scale = torch.tensor(1.3, requires_grad=True)

    def net(x: Tensor) -> Tensor:
        return torch.tanh(scale * x)

    with use_backend(backend, strict=True):
        first, _ = leap_update(x_k, net(x_k), a, b, x_j)
        second, _ = leap_update(first, net(first), b, 0.0, x_end)
    (second * weight).sum().backward()
    ours = scale.grad.clone()

    scale.grad = None
    hat_j = x_k - (a - b).view(-1, 1, 1) * net(x_k)
    pinned = hat_j + (x_j - hat_j).detach()
    hat_end = pinned - b.view(-1, 1, 1) * net(pinned)
    ((hat_end + (x_end - hat_end).detach()) * weight).sum().backward()
    torch.testing.assert_close(ours, scale.grad, rtol=1e-5, atol=1e-6)


@by_backend
@by_dtype
def test_value_is_target_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    """The special values too: adding `target - xhat` to `xhat` would lose them, and last places besides."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 65504.0, 1e-7], dtype=dtype)
    target = torch.cat([special, latents(1000, dtype=dtype).cpu()]).view(2, -1).to(latents(1).device)
    x, velocity = latents(*target.shape, dtype=dtype), latents(*target.shape, dtype=dtype)
    with use_backend(backend, strict=True):
        pinned, _ = leap_update(x, velocity, 0.8, 0.3, target)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(pinned.view(words), target.view(words))
    assert pinned.data_ptr() != target.data_ptr()


@by_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides_and_contiguous_results(backend: str, layout) -> None:
    x, velocity, target = (latents(3, 8, 9, dtype=torch.float32) for _ in range(3))
    with use_backend(backend, strict=True):
        plain = leap_update(x, velocity, 0.8, 0.3, target)
        strided = leap_update(layout(x), layout(velocity), 0.8, 0.3, layout(target))
        assert torch.equal(leap_update(layout(x), velocity, 0.8, 0.3)[0], leap_update(x, velocity, 0.8, 0.3)[0])
    assert torch.equal(strided[0], plain[0])
    assert strided[0].is_contiguous()
    # PyTorch may add a strided tensor in another order.
    torch.testing.assert_close(strided[1], plain[1], rtol=1e-6, atol=0)


@by_backend
def test_expanded_tensors_and_gradients(backend: str) -> None:
    x = latents(1, 5, dtype=torch.float32)
    velocity = latents(3, 5, dtype=torch.float32).requires_grad_()
    with use_backend(backend, strict=True):
        leapt, _ = leap_update(x.expand(3, 5), velocity, 0.9, 0.5)
        leapt.sum().backward()  # the gradient of a sum is an expanded scalar
    torch.testing.assert_close(leapt, x - 0.4 * velocity)
    torch.testing.assert_close(velocity.grad, torch.full((3, 5), -0.4, device=x.device))


def test_sigmas_as_numbers_scalars_and_vectors_agree() -> None:
    x, velocity = latents(2, 6, dtype=torch.float32), latents(2, 6, dtype=torch.float32)
    expected, _ = leap_update(x, velocity, 0.75, 0.5)
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((), (2,)):
            high = torch.full(shape, 0.75, dtype=kind)
            assert torch.equal(leap_update(x, velocity, high, 0.5)[0], expected)
            assert torch.equal(leap_update(x, velocity, high, torch.full((2,), 0.5))[0], expected)


def test_half_precision_sigmas_subtract_without_rounding() -> None:
    high, low = torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0.001, dtype=torch.bfloat16)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    leapt, _ = leap_update(zero, one, high, low)
    assert leapt.item() == -(1.0 - low.float()).item()


def test_no_gradient_to_target_and_sigmas() -> None:
    x, velocity, target = (latents(2, 4, dtype=torch.float32).requires_grad_() for _ in range(3))
    sigma = torch.tensor([0.9, 0.8], requires_grad=True)
    pinned, distance = leap_update(x, velocity, sigma, 0.2, target)
    pinned.sum().backward()
    assert x.grad is not None
    assert target.grad is None
    assert sigma.grad is None
    assert not distance.requires_grad


@by_backend
def test_mixed_dtypes_keep_the_dtype_of_x(backend: str) -> None:
    x, velocity = latents(2, 9, dtype=torch.float32), latents(2, 9, dtype=torch.bfloat16).requires_grad_()
    with use_backend(backend):
        leapt, _ = leap_update(x, velocity, 0.9, 0.5)
        leapt.sum().backward()
    assert leapt.dtype == torch.float32
    torch.testing.assert_close(leapt, x - 0.4 * velocity.float())
    assert velocity.grad.dtype == torch.bfloat16


@pytest.mark.native
@by_dtype
def test_native_gives_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    """Every 16-bit pattern through load and store, and scales that reach subnormals and overflow."""
    words = torch.arange(1 << 16, dtype=torch.int32)
    values = words.to(torch.int16).view(dtype) if dtype != torch.float32 else (words << 16).view(dtype)
    values = values[None]
    for scale in (1e-8, 1e-4, 0.37, 1.0, 1e4, 3e38):
        delta = torch.tensor([scale])
        pairs = [
            (
                native_forward(values, values, delta, None)[0],
                reference_forward(values, values, delta, None)[0],
            ),
            (native_backward(values, delta, dtype), reference_backward(values, delta, dtype)),
        ]
        for native, reference in pairs:
            torch.testing.assert_close(native, reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.native
def test_native_bits_do_not_depend_on_threads() -> None:
    x, velocity, target = (torch.randn(3, 50_021) for _ in range(3))
    delta = torch.rand(3)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(native_forward(x, velocity, delta, target))
    torch.set_num_threads(1)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


BITS_OF_ONE_RUN = """
import torch
from leap_kernels import _native
from leap_kernels.leap_update import native_backward, native_forward
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    x, velocity, target = (torch.randn(2, 9001).to(dtype) for _ in range(3))
    delta = torch.tensor([0.3, 0.7])
    out, distance = native_forward(x, velocity, delta, target)
    leapt, _ = native_forward(x, velocity, delta, None)
    print([t.double().sum().item().hex() for t in (out, distance, leapt, native_backward(x, delta, dtype))])
print(_native.describe().split(",")[1].strip())
"""


@pytest.mark.native
def test_native_bits_do_not_depend_on_the_instruction_set() -> None:
    outputs = []
    for isa in ("baseline", "avx2", "avx512"):
        environment = {**os.environ, "LEAP_NATIVE_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", BITS_OF_ONE_RUN],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout.splitlines())
    assert outputs[0][-1] == "baseline"
    assert outputs[0][:-1] == outputs[1][:-1] == outputs[2][:-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(0, 4), torch.zeros(0, 4), 1.0, 0.0), "at least one element"),
        ((torch.zeros(2, 0), torch.zeros(2, 0), 1.0, 0.0), "at least one element"),
        ((torch.tensor(1.0), torch.tensor(1.0), 1.0, 0.0), r"shape \(B, ...\)"),
        ((torch.zeros(2, 4), torch.zeros(2, 5), 1.0, 0.0), "velocity has"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3), 0.0), "sigma_from"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), 1.0, torch.zeros(2, 1)), "sigma_to"),
        ((torch.zeros(2, 4).int(), torch.zeros(2, 4), 1.0, 0.0), "int32"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), 1.0, 0.0, torch.zeros(2, 4).half()), "target"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), 1.0, 0.0, torch.zeros(2, 3)), "target has"),
        ((torch.zeros(2, 4), torch.zeros(2, 4, device="meta"), 1.0, 0.0), "device"),
    ],
)
def test_wrong_arguments_are_named(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leap_update(*arguments)
