"""Rewards of generated latents and their gradient, through decoder and reward, in chunks whose graph is freed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.inputs.validation import UserError
from leapalign.memory.repetition import repeated
from leapalign.storage.faults import point

RewardFn = Callable[[Tensor, Sequence[str]], Tensor]
"""``reward(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``, differentiable in the images, sample by sample.

An attribute ``title`` is what errors call it."""


Lend = Callable[[], AbstractContextManager[None]]
"""Within the block a reward can be computed, and its gradient; outside of it its weights may be elsewhere."""


@dataclass(frozen=True)
class RewardTerm:
    """One reward of an objective: its part of the loss is ``weight`` times the method's, up to ``threshold``."""

    name: str
    reward: RewardFn
    threshold: float
    weight: float = 1.0
    lend: Lend = nullcontext


@dataclass(frozen=True)
class RewardGradient:
    """rewards: ``(B,)``; gradient: ``(B, ...)``, each sample's ``d reward_b / d latents_b``; images: decoded, in
    [0, 1], ``(B, 3, H, W)``; clamped: ``(B,)``, the share of their values that lay outside."""

    rewards: Tensor
    gradient: Tensor
    images: Tensor
    clamped: Tensor


class _StraightThroughClamp(torch.autograd.Function):
    """Clamp to [0, 1] that still lets gradient pass at saturated pixels, which a plain clamp would freeze."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, images: Tensor) -> Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return gradients[0]


def to_unit_range(images: Tensor) -> Tensor:
    """``images`` clamped to [0, 1]; the gradient passes unchanged."""
    clamped: Tensor = _StraightThroughClamp.apply(images)
    return clamped


CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "straight_through": to_unit_range,
    "plain": lambda images: images.clamp(0, 1),
}
"""What brings decoded images into [0, 1]; ``plain`` has no gradient at values outside."""


def reward_gradient(
    decode: Callable[[Tensor], Tensor],
    reward: RewardFn,
    latents: Tensor,
    prompts: Sequence[str],
    chunk: int | None = None,
    clamp: Callable[[Tensor], Tensor] = to_unit_range,
    lend: Lend = nullcontext,
) -> RewardGradient:
    """``r_b = reward(decode(x_b), prompt_b)`` and ``dr_b/dx_b`` for ``latents (B, ...)``.

    The loss enters later as a factor per sample, ``dL/dx = (dL/dr) (dr/dx)``, so that several losses can share one
    reward gradient. ``chunk``: most samples decoded at once; ``clamp``: one of `CLAMPS`; ``lend``: of the reward's
    weights, for each chunk. Raises UserError where the reward does not return one differentiable score a sample.
    """
    size = chunk or len(latents)
    parts = [
        _chunk_gradient(decode, reward, latents[start : start + size], prompts[start : start + size], clamp, lend)
        for start in range(0, len(latents), size)
    ]
    return RewardGradient(*(torch.cat(column) for column in zip(*parts, strict=True)))


@repeated
def _chunk_gradient(
    decode: Callable[[Tensor], Tensor],
    reward: RewardFn,
    latents: Tensor,
    prompts: Sequence[str],
    clamp: Callable[[Tensor], Tensor],
    lend: Lend,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The columns of a `RewardGradient`; the graph is freed on return."""
    with torch.enable_grad():
        x = latents.detach().requires_grad_()
        decoded = decode(x)
        clamped_image = clamp(decoded)
        image = clamped_image.detach().requires_grad_()
        # The reward's graph is gone, and its weights may be, before that of the decoder unfolds.
        with lend():
            # A copy: what a reward does to a leaf in place PyTorch would refuse in words that nobody can place.
            scores = scores_of(reward, image.clone(), prompts)
            point("reward")
            # A score may have a gradient of weights, and none of the images.
            of_image = torch.autograd.grad(scores.sum(), image, allow_unused=True)[0] if scores.requires_grad else None
            scores = scores.detach()
    if of_image is None:
        raise UserError(
            f"{_title(reward)} returned scores without a gradient to the images, and cannot be trained on; compute "
            "them from the images by PyTorch alone, without detach, numpy or torch.no_grad, or name it in "
            "evaluate.rewards or watch.rewards"
        )
    (gradient,) = torch.autograd.grad(clamped_image, x, of_image)
    clamped = ((decoded < 0) | (decoded > 1)).flatten(1).float().mean(dim=1)
    return scores, gradient, image.detach(), clamped


def scores_of(reward: RewardFn, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``(B,)``, what ``reward`` gives ``images (B, 3, H, W)``.

    Raises UserError where it returns anything but a tensor of one real number a sample.
    """
    return require_scores(reward(images, prompts), len(images), _title(reward))


def require_scores(scores: object, count: int, title: str) -> Tensor:
    """``scores``, where they are a tensor ``(count,)`` of real numbers. Raises UserError otherwise.

    title: what the error calls the reward that returned them.
    """
    if isinstance(scores, Tensor):
        if scores.shape == (count,) and not scores.is_complex():
            return scores
        returned = f"a tensor of {str(scores.dtype).removeprefix('torch.')} and shape {tuple(scores.shape)}"
    else:
        returned = "None" if scores is None else f"an object of type {type(scores).__name__}"
    raise UserError(
        f"{title} must return one score a sample, a tensor of real numbers of shape ({count},), and returned "
        f"{returned}; correct its return"
    )


def _title(reward: RewardFn) -> str:
    title: str = getattr(reward, "title", "a reward")
    return title
