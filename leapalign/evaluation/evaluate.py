"""A run beside its base: the same prompts and seeds, scored by several rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leapalign.config import Config
from leapalign.evaluation.generate import image_batches, sampling_model
from leapalign.evaluation.statistics import Interval, mean_interval
from leapalign.memory.placement import place_reward, training_device
from leapalign.reward_gradient import RewardFn, scores_of
from leapalign.rewards import reward_terms

BASE, RUN, DIFFERENCE = "base", "run", "difference"
Scores = dict[str, dict[str, list[float]]]
"""By arm (`BASE`, `RUN`) and reward: a score for each image."""
Keep = Callable[[str, int, Tensor], None]
"""Is given an arm, the number of a batch's first image, and the batch ``(B, 3, H, W)``."""


def evaluation_rewards(config: Config) -> dict[str, RewardFn]:
    """Those of ``evaluate.rewards``, else those that are trained on, by name; of several called the same, NAME_2.

    Raises UserError where one cannot be loaded.
    """
    chosen = dataclasses.replace(config, reward=list(config.evaluate.rewards) or config.reward)
    rewards = {term.name: term.reward for term in reward_terms(chosen)}
    for reward in rewards.values():
        place_reward(reward, training_device())
    return rewards


def evaluate(
    config: Config,
    arms: Mapping[str, Path | None],
    rewards: Mapping[str, RewardFn],
    prompts: Sequence[str],
    embeddings: Any,
    seed: int,
    keep: Keep | None = None,
) -> Scores:
    """Scores one image a prompt, image i from seed ``seed + i``, by each of ``arms``.

    config: samples with the rollout's steps and guidance; `leapalign.evaluation.sampling.as_evaluated` puts those of
    ``evaluate.*`` there. arms: name and folder of weights, None for the base's. ``embeddings[i]`` belongs to
    ``prompts[i]``. One model is in memory at a time, and ``rollout.batch_size`` images. Raises UserError for weights of
    another model.
    """
    scores: Scores = {}
    # The run's first, so that wrong weights are found before the base's images are made.
    for arm, weights in reversed(list(arms.items())):
        scores[arm] = {name: [] for name in rewards}
        done = 0
        for images in _images(config, weights, embeddings, seed, arm):
            texts = prompts[done : done + len(images)]
            for name, reward in rewards.items():
                scores[arm][name] += _values(reward, images, texts)
            if keep is not None:
                keep(arm, done, images)
            done += len(images)
    return {arm: scores[arm] for arm in arms}


def _images(config: Config, weights: Path | None, embeddings: Any, seed: int, arm: str) -> Iterator[Tensor]:
    """Of a model that is gone when the last one is there."""
    model = sampling_model(config, weights)
    seeds = range(seed, seed + len(embeddings))
    sigmas = model.sigmas(config.rollout.num_steps, config.rollout.sigmas)
    return image_batches(model, embeddings, seeds, sigmas, config.rollout.batch_size, arm)


@torch.no_grad()
def _values(reward: RewardFn, images: Tensor, prompts: Sequence[str]) -> list[float]:
    values: list[float] = scores_of(reward, images, prompts).tolist()
    return values


def summary(scores: Scores) -> dict[str, dict[str, Interval]]:
    """By reward: each arm's mean, and that of `RUN` - `BASE`, image by image, where both are there."""
    names = scores[BASE]
    result = {name: {arm: mean_interval(scores[arm][name]) for arm in scores} for name in names}
    if RUN in scores:
        for name in names:
            pairs = zip(scores[RUN][name], scores[BASE][name], strict=True)
            result[name][DIFFERENCE] = mean_interval([run - base for run, base in pairs])
    return result


def figures(found: Mapping[str, Mapping[str, Interval]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of `summary`."""
    columns = list(next(iter(found.values())))
    rows = [[name, *(str(intervals[column]) for column in columns)] for name, intervals in found.items()]
    return ["mean [95 % interval]", *columns], rows
