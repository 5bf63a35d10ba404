"""Each statistic of the watch by other means, and on a picture made to have it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from leapalign.watch import image_statistics as statistics


def textured(height: int = 40, width: int = 48) -> Tensor:
    return torch.rand(3, 3, height, width)


def luminance(image: Tensor) -> np.ndarray:
    red, green, blue = image.double().numpy()
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_saturation_is_the_spread_of_the_channels() -> None:
    images = textured()
    expected = [np.ptp(image.double().numpy(), axis=0).mean() for image in images]
    assert statistics.saturation(images).tolist() == pytest.approx(expected, rel=1e-5)
    grey, red = torch.full((3, 8, 8), 0.7), torch.zeros(3, 8, 8)
    red[0] = 1
    assert statistics.saturation(torch.stack([grey, red])).tolist() == [0, 1]


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    images = textured()
    expected = [ndimage.laplace(luminance(image))[1:-1, 1:-1].var() for image in images]
    assert statistics.sharpness(images).tolist() == pytest.approx(expected, rel=1e-5)
    blurred = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, 1, 1)))
    assert (statistics.sharpness(blurred) < 0.1 * statistics.sharpness(images)).all()
    assert float(statistics.sharpness(torch.full((1, 3, 8, 8), 0.3))) == pytest.approx(0, abs=1e-10)


def test_edge_density_is_the_share_of_steep_pixels() -> None:
    images = textured() / 3
    expected = []
    for image in images:
        down, across = (part[1:-1, 1:-1] for part in np.gradient(luminance(image)))
        expected.append((np.hypot(down, across) > statistics.EDGE).mean())
    assert 0.05 < min(expected) < max(expected) < 0.95
    assert statistics.edge_density(images).tolist() == pytest.approx(expected, abs=1e-3)
    halves = torch.zeros(1, 3, 12, 12)
    halves[..., 6:] = 1
    # On either side of the border, of ten columns.
    assert float(statistics.edge_density(halves)) == pytest.approx(0.2)


def test_diversity_is_the_distance_between_a_prompts_images() -> None:
    images = torch.rand(2, 4, 3, 64, 96)
    smalls = statistics.small(images.flatten(0, 1)).unflatten(0, (2, 4))
    assert smalls.shape == (2, 4, 3, 32, 32)
    pooled = images.double().numpy().reshape(2, 4, 3, 32, 2, 32, 3).mean((4, 6))
    expected = [
        np.mean([np.sqrt(np.square(a - b).mean()) for a, b in itertools.combinations(prompt, 2)]) for prompt in pooled
    ]
    assert statistics.diversity(smalls).tolist() == pytest.approx(expected, rel=1e-5)
    assert statistics.diversity(smalls[:, :1].expand(-1, 4, -1, -1, -1)).tolist() == [0, 0]


def test_grain_is_no_diversity() -> None:
    """Two pictures differ as much pixel by pixel as one with grain from two seeds, and are several times as diverse."""
    picture = ndimage.gaussian_filter(torch.rand(3, 256, 256).numpy(), (0, 24, 24))
    other = torch.from_numpy(picture[:, ::-1].copy())
    picture = torch.from_numpy(picture)
    size = float((picture - other).square().mean().sqrt()) / 2**0.5
    grained = torch.stack([picture + size * torch.randn(3, 256, 256) for _ in range(2)])
    grain, pictures = (
        float(statistics.diversity(statistics.small(pair)[None])) for pair in (grained, torch.stack([picture, other]))
    )
    assert pictures > 5 * grain


def test_drift_is_relative() -> None:
    base = torch.randn(3, 5, 4)
    assert statistics.drift(base, base).tolist() == [0, 0, 0]
    assert statistics.drift(torch.stack([1.5 * base[0], -base[1], 0 * base[2]]), base).tolist() == pytest.approx(
        [0.5, 2, 1]
    )
