from __future__ import annotations

import pytest
import tolerances
import torch
from kernel_cases import HALVES_AND_FLOAT, LAYOUTS, SHAPES, latents
from leap_kernels import combine_gradient_terms


def exact(direct, nested, coefficient, alpha, max_ratio):
    """Combine sample by sample in float64, with vector norms written out."""
    rows, direct_norms, nested_norms = [], [], []
    for g, q, c in zip(direct.double(), nested.double(), coefficient, strict=True):
        direct_norms.append((g * g).sum().sqrt())
        nested_norms.append((q * q).sum().sqrt())
        scale = 1.0
        if max_ratio is not None and nested_norms[-1] > 0:
            scale = min(1.0, float(max_ratio * direct_norms[-1] / nested_norms[-1]))
        rows.append(float(c) * (g + alpha * scale * q))
    return torch.stack(rows), torch.stack(direct_norms), torch.stack(nested_norms)


@pytest.mark.parametrize("max_ratio", [None, 0.5, 100.0])
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(max_ratio, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    direct, nested = latents(*shape, dtype=dtype), 3 * latents(*shape, dtype=dtype)
    coefficient = -torch.rand(shape[0], device=direct.device)
    combined, direct_norm, nested_norm = combine_gradient_terms(direct, nested, coefficient, 0.3, max_ratio)
    want, want_direct, want_nested = exact(direct, nested, coefficient, 0.3, max_ratio)
    count = direct[0].numel()
    assert combined.dtype == dtype
    assert direct_norm.dtype == nested_norm.dtype == torch.float32
    for got, norm in ((direct_norm, want_direct), (nested_norm, want_nested)):
        assert ((got - norm).abs() <= tolerances.reduction(norm, count, dtype, operations=3)).all()
    # The scale carries the norms' error, which is at most that of `count` additions.
    magnitude = direct.double().abs() + nested.double().abs()
    allowed = tolerances.elementwise(want, magnitude, dtype, operations=8 + round(count**0.5))
    assert ((combined.double() - want).abs() <= allowed).all()


def test_worked_by_hand() -> None:
    direct = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    nested = torch.tensor([[0.0, 10.0], [0.0, 2.0]])
    combined, direct_norm, nested_norm = combine_gradient_terms(direct, nested, -0.5, 0.2, max_ratio=1.0)
    assert direct_norm.tolist() == [5.0, 5.0]
    assert nested_norm.tolist() == [10.0, 2.0]
    # The first nested term is halved to the direct one's norm, the second is within it.
    torch.testing.assert_close(combined, torch.tensor([[-1.5, -2.5], [-1.5, -2.2]]))


def test_zero_nested_term_leaves_the_direct_one() -> None:
    direct = latents(2, 3)
    combined, _, nested_norm = combine_gradient_terms(direct, torch.zeros_like(direct), 2.0, 0.3, max_ratio=1.0)
    assert torch.equal(combined, 2 * direct)
    assert nested_norm.tolist() == [0.0, 0.0]


def test_two_zero_terms_give_zero_not_nan() -> None:
    zero = torch.zeros(2, 3)
    assert torch.equal(combine_gradient_terms(zero, zero, 2.0, 0.3, max_ratio=1.0)[0], zero)


def test_zero_direct_term_caps_the_nested_one_away() -> None:
    nested = latents(2, 3)
    combined, _, _ = combine_gradient_terms(torch.zeros_like(nested), nested, 2.0, 0.3, max_ratio=1.0)
    assert torch.equal(combined, torch.zeros_like(nested))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout) -> None:
    direct, nested = latents(3, 8, 9), latents(3, 8, 9)
    expected = combine_gradient_terms(direct, nested, 0.7, 0.3, 0.5)
    torch.testing.assert_close(combine_gradient_terms(layout(direct), layout(nested), 0.7, 0.3, 0.5), expected)


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
