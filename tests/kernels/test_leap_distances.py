from __future__ import annotations

import pytest
import tolerances
import torch
from kernel_cases import HALVES_AND_FLOAT, LAYOUTS, SHAPES, latents, sigmas
from leap_kernels import leap_distances, leap_update


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = [latents(*shape, dtype=dtype) for _ in range(5)]
    sigma_k, sigma_j = sigmas(shape[0])
    measured = leap_distances(*tensors, sigma_k, sigma_j)
    for b in range(shape[0]):
        x_k, v_k, x_j, v_j, x_end = (t[b].double() for t in tensors)
        k, j = sigma_k[b].double(), sigma_j[b].double()
        exact = ((x_j - x_k + (k - j) * v_k).abs().mean(), (x_end - x_j + j * v_j).abs().mean())
        size = (
            (x_j.abs() + x_k.abs() + k * v_k.abs()).mean(),
            (x_end.abs() + x_j.abs() + j * v_j.abs()).mean(),
        )
        for got, want, magnitude in zip(measured, exact, size, strict=True):
            assert got.dtype == torch.float32
            assert (got[b] - want).abs() <= tolerances.reduction(magnitude, x_k.numel(), dtype, operations=4)


def test_are_those_of_the_two_leaps() -> None:
    x_k, v_k, x_j, v_j, x_end = (latents(3, 5, 7) for _ in range(5))
    sigma_k, sigma_j = (s.double() for s in sigmas(3))
    d_j, d_end = leap_distances(x_k, v_k, x_j, v_j, x_end, sigma_k, sigma_j)
    torch.testing.assert_close(d_j, leap_update(x_k, v_k, sigma_k, sigma_j, x_j)[1])
    torch.testing.assert_close(d_end, leap_update(x_j, v_j, sigma_j, 0.0, x_end)[1])
    assert d_j.dtype == d_end.dtype == torch.float64


def test_vanish_on_straight_trajectories() -> None:
    noise, image = latents(2, 9), latents(2, 9)
    x_k, x_j, velocity = 0.75 * noise + 0.25 * image, 0.5 * noise + 0.5 * image, noise - image
    d_j, d_end = leap_distances(x_k, velocity, x_j, velocity, image, 0.75, 0.5)
    assert d_j.max() < 1e-15
    assert d_end.max() < 1e-15


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout) -> None:
    tensors = [latents(3, 8, 9) for _ in range(5)]
    strided = leap_distances(*(layout(t) for t in tensors), 0.9, 0.4)
    torch.testing.assert_close(strided, leap_distances(*tensors, 0.9, 0.4))


def test_no_gradient() -> None:
    tensors = [latents(2, 3).requires_grad_() for _ in range(5)]
    assert not any(d.requires_grad for d in leap_distances(*tensors, 0.9, 0.4))


def test_wrong_arguments_are_named() -> None:
    good = [torch.zeros(2, 3)] * 5
    with pytest.raises(ValueError, match="x_end"):
        leap_distances(*good[:4], torch.zeros(2, 4), 0.9, 0.4)
    with pytest.raises(ValueError, match="at least one element"):
        leap_distances(*[torch.zeros(0, 3)] * 5, 0.9, 0.4)
    with pytest.raises(ValueError, match="sigma_j"):
        leap_distances(*good, 0.9, torch.zeros(3))
