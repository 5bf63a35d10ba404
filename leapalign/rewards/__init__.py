"""Differentiable rewards by name: ``reward(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``.

A loaded reward may have an attribute ``highest``, a score that no image exceeds.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import CLIPConfig

from leapalign.reward_gradient import RewardFn
from leapalign.rewards.aesthetic import Aesthetic
from leapalign.rewards.clipscore import CLIPScore
from leapalign.rewards.custom import Custom
from leapalign.rewards.hpsv2 import HPSv2
from leapalign.rewards.hpsv3 import HPSv3
from leapalign.rewards.imagereward import ImageReward
from leapalign.rewards.pickscore import PickScore
from leapalign.rewards.simulated import VIT_H_14, simulated_clip
from leapalign.validation import UserError, did_you_mean, validated

REWARDS: dict[str, type[Any]] = {
    "aesthetic": Aesthetic,
    "clipscore": CLIPScore,
    "custom": Custom,
    "hpsv2": HPSv2,
    "hpsv3": HPSv3,
    "imagereward": ImageReward,
    "pickscore": PickScore,
}


def get_reward(name: str, **options: Any) -> RewardFn:
    """The reward called ``name``, loaded. Raises UserError for an unknown name or option, or missing weights."""
    return _settings(name, options).load()


def simulated_reward(name: str, **options: Any) -> nn.Module:
    """The reward called ``name`` at full size, to be built on fake tensors; no weights are read and no user code runs.

    One that does not say how large it is counts as a CLIP ViT-H/14. Raises UserError as `get_reward` for its options.
    """
    settings = _settings(name, options)
    if hasattr(settings, "simulated"):
        simulated: nn.Module = settings.simulated()
        return simulated
    return simulated_clip(CLIPConfig.from_pretrained(VIT_H_14), "float32")


def _settings(name: str, options: dict[str, Any]) -> Any:
    if name not in REWARDS:
        raise UserError(f"unknown reward '{name}'{did_you_mean(name, REWARDS)}")
    return validated(REWARDS[name], options, f"reward '{name}'")
