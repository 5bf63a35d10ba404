from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from leapalign.reward_gradient import CLAMPS, reward_gradient

LATENTS = torch.linspace(-0.4, 1.3, 5 * 12, dtype=torch.float64).view(5, 12)
PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def decode(latents: Tensor) -> Tensor:
    return latents.view(-1, 3, 2, 2)


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.square().mean(dim=(1, 2, 3)) * torch.tensor([len(prompt) for prompt in prompts])


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 9])
def test_gradient_of_each_sample_whatever_the_chunk(chunk: int | None) -> None:
    scored = reward_gradient(decode, brightness, LATENTS, PROMPTS, chunk)
    clamped = LATENTS.clamp(0, 1)
    length = torch.tensor([len(prompt) for prompt in PROMPTS])
    torch.testing.assert_close(scored.rewards, clamped.square().mean(dim=1) * length)
    torch.testing.assert_close(scored.gradient, 2 * clamped / 12 * length[:, None])
    torch.testing.assert_close(scored.images, decode(clamped))
    assert not scored.rewards.requires_grad


def summed(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.sum(dim=(1, 2, 3))


def test_values_outside_keep_their_gradient_and_with_a_plain_clamp_have_none() -> None:
    """Of a reward that asks of every value alike, the two gradients have a cosine of sqrt(1 - share outside)."""
    outside = (LATENTS < 0) | (LATENTS > 1)
    passed, plain = (
        reward_gradient(decode, summed, LATENTS, PROMPTS, clamp=CLAMPS[name]) for name in ("straight_through", "plain")
    )
    assert torch.equal(passed.gradient, torch.ones_like(LATENTS))
    assert torch.equal(plain.gradient, (~outside).to(LATENTS))
    assert torch.equal(passed.images, plain.images)
    assert torch.equal(plain.clamped, outside.float().mean(dim=1))
    assert outside.float().mean() == pytest.approx(25 / 60)
    cosine = torch.cosine_similarity(passed.gradient.flatten(), plain.gradient.flatten(), dim=0)
    assert cosine.item() == pytest.approx((35 / 60) ** 0.5)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: images.mean(), r"shape \(5,\)"),
        (lambda images, prompts: None, r"^a reward must return one score a sample, .* and returned None; correct"),
        (lambda images, prompts: images.mean(dim=(1, 2, 3)) + 0j, "returned a tensor of complex128"),
        (lambda images, prompts: images.mean(dim=(1, 2, 3)).detach(), "without a gradient to the images"),
    ],
)
def test_unusable_rewards_are_refused(reward: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_gradient(decode, reward, LATENTS, PROMPTS)
