from __future__ import annotations

import pytest
import torch
from kernel_cases import HALVES_AND_FLOAT, WORDS, latents
from leap_kernels import scale_gradient
from leap_kernels.scale_gradient import native_scaled, reference


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3), torch.tensor([0.0, 0.3, 1.0])], ids=str)
def test_value_and_gradient_of_the_blend(factor) -> None:
    x, grad = latents(3, 4, 5).requires_grad_(), latents(3, 4, 5)
    y = scale_gradient(x, factor)
    assert torch.equal(y, x)
    (ours,) = torch.autograd.grad(y, x, grad)
    alpha = torch.as_tensor(factor, dtype=torch.float64).expand(3).view(-1, 1, 1)
    (blend,) = torch.autograd.grad(alpha * x + (1 - alpha) * x.detach(), x, grad)
    torch.testing.assert_close(ours, blend, rtol=1e-6, atol=0)


@pytest.mark.native
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    x, grad = latents(2, 1001, dtype=dtype).requires_grad_(), latents(2, 1001, dtype=dtype)
    (ours,) = torch.autograd.grad(scale_gradient(x, 0.1), x, grad)
    assert ours.dtype == dtype
    assert torch.equal(ours, (torch.tensor(0.1) * grad.float()).to(dtype))


@pytest.mark.native
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("result", HALVES_AND_FLOAT, ids=str)
def test_native_products_have_the_bits_of_the_reference(dtype: torch.dtype, result: torch.dtype) -> None:
    """Every 16-bit pattern through load and store, and factors that reach subnormals and overflow."""
    words = torch.arange(1 << 16, dtype=torch.int32)
    values = words.to(torch.int16).view(dtype) if dtype != torch.float32 else (words << 16).view(dtype)
    for factor in (1e-8, 1e-4, 0.37, 1.0, 1e4, 3e38):
        (native,) = native_scaled(values[None], [torch.tensor([factor])], result)
        (expected,) = reference(values[None], [torch.tensor([factor])], result)
        assert torch.equal(native.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(native[numbers].view(WORDS[result]), expected[numbers].view(WORDS[result]))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        scale_gradient(torch.zeros(0, 2), 0.3)
    with pytest.raises(ValueError, match="factor"):
        scale_gradient(torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="int64"):
        scale_gradient(torch.zeros(2, dtype=torch.int64), 0.3)
