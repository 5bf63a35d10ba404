"""Differentiable rewards by name: ``reward(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``.

A loaded reward may have an attribute ``highest``, a score that no image exceeds, ``title``, what errors call it, and
``prompt_limit``, a `leapalign.inputs.prompt_limits.PromptLimit` where it cuts prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import CLIPConfig

from leapalign.config import Config
from leapalign.inputs.bounds import FiniteFloat, PositiveFloat
from leapalign.inputs.validation import UserError, did_you_mean, shortened, validated
from leapalign.reports.progress import progress
from leapalign.reward_gradient import RewardFn, RewardTerm
from leapalign.rewards.aesthetic import Aesthetic
from leapalign.rewards.clipscore import CLIPScore
from leapalign.rewards.custom import Custom
from leapalign.rewards.hpsv2 import HPSv2
from leapalign.rewards.hpsv3 import HPSv3
from leapalign.rewards.imagereward import ImageReward
from leapalign.rewards.pickscore import PickScore
from leapalign.rewards.simulated import VIT_H_14, simulated_clip

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
    return _settings(name, **options).load()


def reward_terms(config: Config, make: Callable[..., RewardFn] = get_reward) -> list[RewardTerm]:
    """The rewards of ``config``, made by ``make(name, **options)``, with their thresholds and weights.

    They are called as `reward_names` says. Raises UserError as `get_reward`.
    """
    named: list[tuple[str, Share, dict[str, Any]]] = []
    # All are checked before the first is loaded.
    for name, settings in zip(reward_names(config.rewards), config.rewards, strict=True):
        options = dict(settings)
        said = validated(Share, {key: options.pop(key) for key in ("threshold", "weight") if key in options}, "reward")
        _settings(**options)
        named.append((name, said, options))
    terms = []
    with progress("load the rewards", len(named), "reward") as bar:
        for name, said, options in named:
            threshold = config.threshold if said.threshold is None else said.threshold
            terms.append(RewardTerm(name, make(**options), threshold, said.weight))
            bar.update()
    return terms


def reward_names(rewards: Sequence[dict[str, Any]]) -> list[str]:
    """What ``rewards`` are called: of several of one name, the second NAME_2."""
    names = [str(settings["name"]) for settings in rewards]
    same = [names[:number].count(name) for number, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, same, strict=True)]


@dataclass(frozen=True)
class Share:
    """What part a reward has in training: the options that all have."""

    threshold: FiniteFloat | None = None
    """An image whose reward lies above it carries no gradient of this one; null: the config's ``threshold``."""
    weight: PositiveFloat = 1.0
    """Its part of the loss is so many times the method's."""


def simulated_reward(name: str, **options: Any) -> nn.Module:
    """The reward called ``name`` at full size, to be built on fake tensors; no weights are read and no user code runs.

    One that does not say how large it is counts as a CLIP ViT-H/14. Raises UserError as `get_reward` for its options.
    """
    settings = _settings(name, **options)
    if hasattr(settings, "simulated"):
        simulated: nn.Module = settings.simulated()
        return simulated
    return simulated_clip(CLIPConfig.from_pretrained(VIT_H_14), "float32")


def _settings(name: str, **options: Any) -> Any:
    if name not in REWARDS:
        raise UserError(f"unknown reward '{shortened(name)}'{did_you_mean(name, REWARDS)}")
    return validated(REWARDS[name], options, f"reward '{name}'")
