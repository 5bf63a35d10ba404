from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, latents
from leap_kernels import combine_gradient_terms, use_backend

by_backend = pytest.mark.parametrize("backend", BACKENDS)


@by_backend
def test_worked_by_hand(backend: str) -> None:
    direct = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    nested = torch.tensor([[0.0, 10.0], [0.0, 2.0]])
    with use_backend(backend, strict=True):
        combined, direct_norm, nested_norm = combine_gradient_terms(direct, nested, -0.5, 0.2, max_ratio=1.0)
    assert direct_norm.tolist() == [5.0, 5.0]
    assert nested_norm.tolist() == [10.0, 2.0]
    # The first nested term is halved to the direct one's norm, the second is within it.
    torch.testing.assert_close(combined, torch.tensor([[-1.5, -2.5], [-1.5, -2.2]]))


@by_backend
def test_terms_of_zero(backend: str) -> None:
    some, zero = latents(2, 3, dtype=torch.float32), torch.zeros(2, 3)
    with use_backend(backend, strict=True):
        without_nested, _, nested_norm = combine_gradient_terms(some, zero, 2.0, 0.3, max_ratio=1.0)
        without_direct, _, _ = combine_gradient_terms(zero, some, 2.0, 0.3, max_ratio=1.0)
        without_both, _, _ = combine_gradient_terms(zero, zero, 2.0, 0.3, max_ratio=1.0)
    assert torch.equal(without_nested, 2 * some)
    assert nested_norm.tolist() == [0.0, 0.0]
    # Capped away, and not 0 / 0.
    assert torch.equal(without_direct, zero)
    assert torch.equal(without_both, zero)


@by_backend
@pytest.mark.parametrize("magnitude", [1e-38, 1e-25, 1e-18, 1e18, 1e22, 1e36])
@pytest.mark.parametrize("max_ratio", [None, 0.5])
def test_norms_of_any_magnitude(backend: str, max_ratio: float | None, magnitude: float) -> None:
    """Whose squares are no float32 numbers."""
    shape = (2, 1500)
    direct, nested = (magnitude * latents(*shape, dtype=torch.float64) for _ in range(2))
    nested[1] = 0
    exact = combine_gradient_terms(direct, nested, 1.0, 0.3, max_ratio)
    with use_backend(backend, strict=True):
        found = combine_gradient_terms(direct.float(), nested.float(), 1.0, 0.3, max_ratio)
    for ours, double in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), double, rtol=2e-6, atol=1e-6 * magnitude)


@by_backend
def test_norms_beyond_float32_are_infinite(backend: str) -> None:
    huge = torch.full((1, 1100), 3e38)
    with use_backend(backend, strict=True):
        _, direct_norm, nested_norm = combine_gradient_terms(huge, torch.full_like(huge, torch.inf), 1.0, 0.3)
    assert direct_norm.isinf().all()
    assert nested_norm.isinf().all()


@by_backend
@pytest.mark.parametrize("max_ratio", [None, 0.5])
def test_a_broken_gradient_is_not_hidden(backend: str, max_ratio: float | None) -> None:
    """Neither behind the cap nor in the norms, and the other samples stay whole."""
    direct, nested = torch.ones(2, 40), torch.ones(2, 40)
    nested[0, 7] = torch.nan
    with use_backend(backend, strict=True):
        combined, _, nested_norm = combine_gradient_terms(direct, nested, 1.0, 0.3, max_ratio)
    assert combined[0, 7].isnan()
    assert nested_norm.isnan().tolist() == [True, False]
    assert combined[1].isfinite().all()


@by_backend
@pytest.mark.parametrize("shape", [(40, 5), (3, 300_000)], ids=str)
def test_groups_of_samples_keep_their_own_cap(backend: str, shape: tuple[int, ...]) -> None:
    """The native code takes small samples together and large ones one by one."""
    if backend == "triton" and shape[1] > 1000:
        shape = (3, 3000)
    direct, nested = torch.ones(shape), torch.ones(shape)
    nested *= torch.arange(1, shape[0] + 1)[:, None]
    with use_backend(backend, strict=True):
        combined, _, _ = combine_gradient_terms(direct, nested, 1.0, 0.5, max_ratio=2.0)
    capped = torch.arange(1.0, shape[0] + 1).clamp(max=2)
    torch.testing.assert_close(combined, (1 + 0.5 * capped)[:, None].expand(shape))


def test_no_gradient() -> None:
    direct = latents(2, 3).requires_grad_()
    assert not any(t.requires_grad for t in combine_gradient_terms(direct, direct, 1.0, 0.3))


def test_wrong_arguments_are_named() -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="nested"):
        combine_gradient_terms(good, torch.zeros(2, 4), 1.0, 0.3)
    with pytest.raises(ValueError, match="coefficient"):
        combine_gradient_terms(good, good, torch.zeros(3), 0.3)
    with pytest.raises(ValueError, match="max_ratio"):
        combine_gradient_terms(good, good, 1.0, 0.3, max_ratio=-1.0)
    with pytest.raises(ValueError, match="at least one element"):
        combine_gradient_terms(torch.zeros(0, 3), torch.zeros(0, 3), 1.0, 0.3)
