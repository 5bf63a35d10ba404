from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, HALVES_AND_FLOAT, WORDS, latents
from leap_kernels import leap_update, use_backend
from torch import Tensor

by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)


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
    assert torch.equal(pinned.view(WORDS[dtype]), target.view(WORDS[dtype]))
    assert pinned.data_ptr() != target.data_ptr()


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
