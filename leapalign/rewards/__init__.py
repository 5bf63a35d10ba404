"""Differentiable rewards by name: ``reward(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``."""

from __future__ import annotations

from typing import Any

from leapalign.reward_gradient import RewardFn
from leapalign.rewards.hpsv3 import HPSv3
from leapalign.rewards.imagereward import ImageReward
from leapalign.rewards.pickscore import PickScore
from leapalign.validation import UserError, did_you_mean, validated

REWARDS: dict[str, type[Any]] = {
    "hpsv3": HPSv3,
    "imagereward": ImageReward,
    "pickscore": PickScore,
}


def get_reward(name: str, **options: Any) -> RewardFn:
    """The reward called ``name``, loaded. Raises UserError for an unknown name or option, or missing weights."""
    if name not in REWARDS:
        raise UserError(f"unknown reward '{name}'{did_you_mean(name, REWARDS)}")
    return validated(REWARDS[name], options, f"reward '{name}'").load()
