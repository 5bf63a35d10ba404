"""Every reward against the library it was published with: its scores of any image and prompt, and their gradients.

The library's transform, tokens and calls are written from its published code; its networks are its own classes, or
their formulas. Eight shapes of image, and six prompts as one batch, which the library scores one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from official_rewards import PAIRS, Pair
from torch import Tensor
from torch.nn import functional as F

SHAPES = {
    "square": (64, 64),
    "portrait": (96, 48),
    "landscape": (48, 112),
    "odd": (37, 53),
    "tiny": (9, 7),
    "strip": (30, 250),
    "margin": (100, 111),  # before towers of 28 and 32 alike, three rows too many
    "large": (1100, 1300),
}
PROMPTS = {
    "empty": "",
    "long": "a red circle " * 60,
    "letters": "ein Käfer am Fluß, 日本の庭",
    "quotes": "a sign \"it's 5 o'clock\", \u2018now\u2019 &amp; \u201cthen\u201d",
    "emoji": "a 🦊 beside a 👩‍🚀",
    "lines": "first line\n\n  second line\twith a tab\nthird",
}
TEXTS = list(PROMPTS.values())


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(0)
    return PAIRS[request.param](tmp_path_factory.mktemp(request.param))


def pictures(shape: str) -> Tensor:
    """Six, of mid-tones: nothing overshoots, which 8-bit pictures would clip."""
    torch.manual_seed(2)
    coarse = F.interpolate(torch.rand(6, 3, 7, 7), SHAPES[shape], mode="bicubic").clamp(0, 1)
    return 0.25 + 0.5 * coarse


Scored = tuple[Tensor, Tensor]
"""Scores ``(B,)``, and their gradient at the images."""


def scored(reward: Callable[[Tensor, list[str]], Tensor], images: Tensor, texts: list[str]) -> Scored:
    images = images.detach().requires_grad_()
    scores = reward(images, texts)
    return scores.detach(), torch.autograd.grad(scores.sum(), images)[0]


def one_by_one(pair: Pair, images: Tensor) -> Scored:
    each = [scored(pair.official, image[None], [text]) for image, text in zip(images, TEXTS, strict=True)]
    return torch.cat([scores for scores, _ in each]), torch.cat([gradient for _, gradient in each])


def same(found: Scored, expected: Scored) -> None:
    """Up to a thousandth of how much scores differ between images, and of the steepest slope."""
    spread = float(expected[0].std())
    assert spread > 1e-3 * float(expected[0].abs().mean())
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-3 * spread)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-3 * float(expected[1].abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_gradients_are_the_library_s(pair: Pair, shape: str) -> None:
    images = pictures(shape)
    same(scored(pair.load(), images, TEXTS), one_by_one(pair, images))


def errors(found: Scored, exact: Scored) -> list[float]:
    """Of scores and of gradients, as lengths."""
    return [float((one - other).norm()) for one, other in zip(found, exact, strict=True)]


@pytest.mark.parametrize("shape", ["odd", "landscape"])
def test_bfloat16_is_as_far_off_as_the_library_s_own(pair: Pair, shape: str) -> None:
    """From the library in float32, with its towers cast as ours are: at most twice as far, scores and gradients."""
    images = pictures(shape)
    exact = one_by_one(pair, images)
    weights = [copy.deepcopy(tower.state_dict()) for tower in pair.towers]
    for tower in pair.towers:
        tower.bfloat16()
    theirs = errors(one_by_one(pair, images), exact)
    for tower, before in zip(pair.towers, weights, strict=True):
        tower.float().load_state_dict(before)
    found = scored(pair.load(dtype="bfloat16"), images, TEXTS)
    assert found[0].dtype == torch.float32
    ours = errors(found, exact)
    assert min(theirs) > 0
    assert all(own <= 2 * other for own, other in zip(ours, theirs, strict=True))


def test_overshoot_that_hpsv2_keeps_is_that_of_its_transform(tmp_path: Path) -> None:
    """Of black and white blocks at twice their size; clipped, as by default, scores are others."""
    torch.manual_seed(0)
    pair = PAIRS["hpsv2"](tmp_path)
    blocks = (torch.rand(6, 3, 7, 7) > 0.5).float().repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = one_by_one(pair, blocks)
    same(scored(pair.load(clip_overshoot=False), blocks, TEXTS), expected)
    with pytest.raises(AssertionError):
        same(scored(pair.load(), blocks, TEXTS), expected)
