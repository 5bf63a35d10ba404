"""Fitting images as CLIP's transforms do; HPSv2's own is in test_hpsv2.py."""

from __future__ import annotations

import math

import pytest
import torch
from reward_cases import PIL_ROUNDING, SIZES, smooth_images, to_pictures
from torch.nn import functional
from transformers import CLIPImageProcessor

from leapalign.rewards.preprocessing import CLIP_MEAN, CLIP_STD, contain, cover, normalised, resize, unit_vectors


@pytest.mark.parametrize("size", SIZES)
def test_cover_is_clip_s_transform(size: tuple[int, int]) -> None:
    images = smooth_images(*size)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    official = processor(to_pictures(images), return_tensors="pt").pixel_values
    assert float((normalised(cover(images, 28)) - official).abs().max()) <= PIL_ROUNDING


def test_centre_of_an_odd_margin_is_the_library_s_own() -> None:
    """torchvision rounds half of it to the even one, transformers takes the floor: a pixel apart at 3, 7, 11, ...

    So at 832 x 1216 before a tower of 224: 327 rows, of which 103 are cut off.
    """
    torchvision = {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 6: 3, 7: 4, 8: 4, 103: 52}
    transformers = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 3, 8: 4, 103: 51}
    for margin in torchvision:
        line = torch.linspace(0, 1, 28 + margin)
        images = line.view(1, 1, -1, 1).expand(1, 3, -1, 28)
        for first, centre in ((torchvision[margin], round), (transformers[margin], math.floor)):
            tall, wide = cover(images, 28, centre)[0, 0, :, 0], cover(images.mT, 28, centre)[0, 0, 0]
            torch.testing.assert_close(tall, line[first : first + 28])
            torch.testing.assert_close(wide, line[first : first + 28])
    assert 224 * 1216 // 832 - 224 == 103


@pytest.mark.open_clip
@pytest.mark.parametrize("size", SIZES)
def test_cover_is_open_clip_s_transform(size: tuple[int, int]) -> None:
    import open_clip

    images = smooth_images(*size)
    transform = open_clip.image_transform(28, False, CLIP_MEAN, CLIP_STD, resize_mode="shortest")
    official = torch.stack([transform(picture) for picture in to_pictures(images)])
    assert float((normalised(cover(images, 28)) - official).abs().max()) <= PIL_ROUNDING


@pytest.mark.parametrize("size", [(60, 20), (20, 60)])
def test_contain_centres_the_whole_image_on_black(size: tuple[int, int]) -> None:
    fitted = contain(torch.ones(1, 3, *size), 12)
    fitted = fitted if size[0] > size[1] else fitted.transpose(2, 3)
    torch.testing.assert_close(fitted[..., 4:8], torch.ones(1, 3, 12, 4))
    assert not fitted[..., :4].any()
    assert not fitted[..., 8:].any()


def test_a_very_long_image_keeps_a_row() -> None:
    assert float(contain(torch.ones(1, 3, 400, 2), 8).sum()) == pytest.approx(3 * 8)


@pytest.mark.parametrize("new", [(28, 28), (11, 70), (96, 40), (1, 1)])
@pytest.mark.parametrize("old", [(40, 40), (97, 61), (28, 200), (1, 5)])
def test_resize_is_pytorch_s_antialiased_bicubic(old: tuple[int, int], new: tuple[int, int]) -> None:
    """Forwards and backwards, in float64; PIL's own pictures are compared by the tests of `cover` and `contain`."""
    images = torch.rand(2, 3, *old, dtype=torch.float64, requires_grad=True)
    plain = functional.interpolate(images, new, mode="bicubic", antialias=True)
    fitted = resize(images, *new, clip=False)
    torch.testing.assert_close(fitted, plain, rtol=0, atol=1e-12)
    weight = torch.randn_like(fitted)
    found, expected = (torch.autograd.grad((out * weight).sum(), images)[0] for out in (fitted, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_resize_in_half_precision_rounds_once() -> None:
    images = torch.rand(1, 3, 90, 90)
    exact = resize(images.bfloat16().float(), 28, 28)
    assert torch.equal(resize(images.bfloat16(), 28, 28), exact.bfloat16())


def test_no_operation_of_resize_adds_by_atomics() -> None:
    """Products alone, forwards and backwards: no resampling or scattering, whose CUDA backward has no order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        resize(torch.rand(1, 3, 40, 40, requires_grad=True), 28, 28).sum().backward()
    names = {event.name for event in seen.events()}
    assert any("bmm" in name or "mm" in name for name in names)
    assert not [name for name in names if "upsample" in name or "index_add" in name or "scatter" in name]


def test_overshoot_is_clipped_but_keeps_its_gradient() -> None:
    images = (torch.rand(1, 3, 24, 24) > 0.5).float().requires_grad_()
    plain = resize(images, 40, 40, clip=False)
    assert bool((plain < 0).any())
    assert bool((plain > 1).any())
    fitted = resize(images, 40, 40)
    assert torch.equal(fitted, plain.clamp(0, 1))
    weight = torch.randn_like(fitted)
    found, expected = (torch.autograd.grad((out * weight).sum(), images)[0] for out in (fitted, plain))
    assert torch.equal(found, expected)


def test_unit_vectors_are_of_length_one_in_float32() -> None:
    vectors = unit_vectors(torch.randn(5, 300, dtype=torch.bfloat16))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
