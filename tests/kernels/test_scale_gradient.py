from __future__ import annotations

import pytest
import torch
from kernel_cases import HALVES_AND_FLOAT, latents
from leap_kernels import scale_gradient
from leap_kernels.scale_gradient import reference_backward


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3), torch.tensor([0.0, 0.3, 1.0])], ids=str)
def test_value_and_gradient_of_the_blend(factor) -> None:
    x, grad = latents(3, 4, 5).requires_grad_(), latents(3, 4, 5)
    y = scale_gradient(x, factor)
    assert torch.equal(y, x)
    assert y.data_ptr() == x.data_ptr()
    (ours,) = torch.autograd.grad(y, x, grad)
    alpha = torch.as_tensor(factor, dtype=torch.float64).expand(3).view(-1, 1, 1)
    (blend,) = torch.autograd.grad(alpha * x + (1 - alpha) * x.detach(), x, grad)
    torch.testing.assert_close(ours, blend, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    x, grad = latents(2, 1001, dtype=dtype).requires_grad_(), latents(2, 1001, dtype=dtype)
    (ours,) = torch.autograd.grad(scale_gradient(x, 0.1), x, grad)
    assert ours.dtype == dtype
    assert torch.equal(ours, (torch.tensor(0.1) * grad.float()).to(dtype))


def test_reference_backward_on_strided_gradients() -> None:
    grad = latents(4, 3).t()
    expected = torch.stack([f * g for f, g in zip((1.0, 2.0, 3.0), grad, strict=True)])
    factor = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(reference_backward(grad, factor), expected)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        scale_gradient(torch.zeros(0, 2), 0.3)
    with pytest.raises(ValueError, match="factor"):
        scale_gradient(torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="int64"):
        scale_gradient(torch.zeros(2, dtype=torch.int64), 0.3)
