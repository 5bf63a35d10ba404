"""The CLIP reward against transformers' own model and image processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reward_cases import PIL_ROUNDING, smooth_images, to_pictures
from transformers import CLIPImageProcessor, CLIPModel

from leapalign.inputs.validation import UserError
from leapalign.rewards import get_reward
from leapalign.tiny.train_reward import build_scorer, save_scorer

PROMPTS = ["a red circle", "two squares", "a cross above a square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    save_scorer(build_scorer(), path)
    return path


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (30, 50), (16, 16)])
def test_score_is_transformers_own(folder: Path, size: tuple[int, int]) -> None:
    """The official path rounds to 8 bit and resizes with PIL: the two agree to that rounding."""
    images = smooth_images(*size)
    model, processor = CLIPModel.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    reward = get_reward("pickscore", path=str(folder))
    pixels = processor(to_pictures(images), return_tensors="pt").pixel_values
    tokens = reward.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        official = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        expected = (official.image_embeds * official.text_embeds).sum(-1)
        assert float((reward.preprocess(images) - pixels).abs().max()) <= PIL_ROUNDING
        torch.testing.assert_close(reward(images, PROMPTS), expected, atol=5e-3, rtol=0)


def test_scales(folder: Path) -> None:
    images = smooth_images(32, 32)
    cosine, logit = (get_reward("pickscore", path=str(folder), scale=scale) for scale in ("cosine", "logit"))
    with torch.no_grad():
        factor = cosine.model.logit_scale.exp()
        torch.testing.assert_close(logit(images, PROMPTS), factor * cosine(images, PROMPTS))


def test_gradient_reaches_every_pixel_and_no_weight(folder: Path) -> None:
    reward = get_reward("pickscore", path=str(folder))
    images = smooth_images(32, 32).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert bool((images.grad.abs().amax(dim=1) > 0).all())
    assert all(parameter.grad is None for parameter in reward.parameters())


def test_gradient_is_the_slope(folder: Path) -> None:
    reward = get_reward("pickscore", path=str(folder)).double()
    # Mid-tones: nothing overshoots, so the clip, whose gradient is not its slope, does nothing.
    images = (0.3 + 0.4 * smooth_images(32, 32).double()).requires_grad_()
    direction = torch.randn_like(images)
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, PROMPTS).sum() for sign in (1, -1))
    assert float((ahead - behind) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pikscore", {}, "did you mean 'pickscore'"),
        ("pickscore", {"pth": "x"}, "did you mean 'path'"),
        ("pickscore", {"scale": "raw"}, "'scale' is 'raw'"),
    ],
)
def test_bad_options_are_one_sentence(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_reward(name, **options)


def test_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check reward\.path"):
        get_reward("pickscore", path=str(tmp_path))


def test_images_are_not_quantised(folder: Path) -> None:
    reward = get_reward("pickscore", path=str(folder))
    images = torch.full((1, 3, 32, 32), 0.5)
    shifted = images + 1e-4
    assert not np.array_equal(reward.preprocess(images), reward.preprocess(shifted))


def test_towers_in_bfloat16_score_nearly_the_same_in_float32(folder: Path) -> None:
    images = smooth_images(32, 32)
    full, half = (get_reward("pickscore", path=str(folder), dtype=dtype) for dtype in ("float32", "bfloat16"))
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full(images, PROMPTS), rtol=0, atol=2e-2)
