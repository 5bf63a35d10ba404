"""HPSv3 against transformers' Qwen2-VL, called as the model's own repository calls it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hpsv3_model import PROMPTS, Official, load, smooth_images
from PIL import Image
from transformers import (
    Qwen2VLImageProcessorPil,
)

from leapalign.rewards.hpsv3 import _fuse
from leapalign.rewards.hpsv3_prompt import conversation

PIXELS = 256 * 28 * 28


def test_question_is_the_published_one() -> None:
    """Digest of the repository's INSTRUCTION and prompt_with_special_token, one after the other."""
    text = conversation("{text_prompt}", 1).split("<|vision_end|>")[1].split("<|im_end|>")[0]
    digest = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_tokens_are_the_chat_templates(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    torch.testing.assert_close(load(hpsv3_folder).tokenize(PROMPTS, 12), official_hpsv3.tokens(PROMPTS, 12))


@pytest.mark.parametrize("size", [(448, 448), (512, 512), (100, 60), (333, 777), (1024, 1024)])
def test_pixels_are_the_image_processors(hpsv3_folder: Path, official_hpsv3: Official, size: tuple[int, int]) -> None:
    # Mid-tones: PIL clips overshoot after either pass of the resize, tensors only at its end.
    images = 0.2 + 0.6 * smooth_images(*size)
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})
    expected = processor(pictures, return_tensors="pt")
    pixels, grid = load(hpsv3_folder).preprocess(images)
    assert torch.equal(grid, expected.image_grid_thw)
    assert pixels.shape == expected.pixel_values.shape
    # Rounded to 8 bit on the way in, after either pass of the resize, and once more where weights are fixed-point:
    # four times 0.5/255, over the smallest std.
    assert float((pixels - expected.pixel_values).abs().max()) <= 4 * 0.5 / 255 / 0.26


def test_score_and_gradient_are_the_officials(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    reward = load(hpsv3_folder)
    images = smooth_images(64, 96).requires_grad_()
    scores = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    expected = official_hpsv3(*reward.preprocess(images), PROMPTS)[:, 0]
    (expected_gradient,) = torch.autograd.grad(expected.sum(), images)
    assert float(expected.detach().std()) > 1e-3
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_image_and_prompt_change_the_score(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    reward = load(hpsv3_folder)
    images = smooth_images(64, 64)
    with torch.no_grad():
        scores, swapped = reward(images, PROMPTS), reward(images.flip(0), PROMPTS)
        asked = reward(images, PROMPTS[::-1])
    assert bool(((scores - swapped).abs() > 1e-4).all())
    assert bool(((scores - asked).abs() > 1e-4).all())


def test_batch_is_one_by_one(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    """Prompts differ in length: padding changes no score and no gradient."""
    reward = load(hpsv3_folder)
    images = smooth_images(64, 64).requires_grad_()
    scores = reward(images, PROMPTS)
    single = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(scores, single, rtol=1e-5, atol=1e-6)
    together, apart = (torch.autograd.grad(value.sum(), images)[0] for value in (scores, single))
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max()))


def test_gradient_reaches_saturated_pixels_and_no_weight(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    reward = load(hpsv3_folder)
    images = smooth_images(56, 56)
    images[..., :28] = 1
    images[..., 28:] = 0
    images.requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert bool((images.grad.abs().amax(dim=1) > 0).all())
    assert not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_layers_of_both_towers_are_recomputed(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    reward = load(hpsv3_folder)
    runs = dict.fromkeys(("vision", "language"), 0)

    def count(name: str) -> Callable[..., None]:
        return lambda *_: runs.__setitem__(name, runs[name] + 1)

    for block in reward.model.visual.blocks:
        block.mlp.register_forward_pre_hook(count("vision"))
    for layer in reward.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(count("language"))
    score = reward(smooth_images(64, 64, 1).requires_grad_(), PROMPTS[:1])
    assert runs == {"vision": 2, "language": 3}
    score.sum().backward()
    assert runs == {"vision": 4, "language": 6}


@pytest.mark.liger
@pytest.mark.cuda
def test_ligers_kernels_score_the_same(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    # Not in Triton's interpreter: it hands scalars over as Python's, on which Liger 0.8.5 calls `.to`.
    plain, fused = load(hpsv3_folder), load(hpsv3_folder)
    _fuse(fused.model)
    images = smooth_images(64, 64, 1).to("cuda").requires_grad_()
    scores, fused_scores = (reward.to("cuda")(images, PROMPTS[:1]) for reward in (plain, fused))
    torch.testing.assert_close(fused_scores, scores, rtol=1e-4, atol=1e-5)
    expected, gradient = (torch.autograd.grad(score, images)[0] for score in (scores, fused_scores))
    assert not torch.equal(gradient, expected)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_bfloat16_scores_nearly_the_same_with_the_head_in_float32(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    images = smooth_images(64, 64)
    half = load(hpsv3_folder, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.head[0].weight.dtype == torch.float32
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, load(hpsv3_folder)(images, PROMPTS), rtol=0, atol=0.1)
