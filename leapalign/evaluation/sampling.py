"""The settings that images to be judged are sampled with: the rollout's, or others by ``evaluate.*``."""

from __future__ import annotations

import dataclasses
from typing import Any

from leapalign.config import Config
from leapalign.models.folder import takes_guidance
from leapalign.storage.embedded import resolve


def as_evaluated(config: Config) -> Config:
    """``config`` with ``evaluate.num_steps`` and ``evaluate.guidance`` in the place of the rollout's and the model's.

    Guidance is ``model.guidance`` of a model that takes it as an input, and ``model.true_cfg_scale`` of any other.
    Applied twice it changes nothing more. Raises UserError where the model's configuration cannot be read.
    """
    asked = config.evaluate
    rollout, model = config.rollout, config.model
    if asked.num_steps is not None:
        rollout = dataclasses.replace(rollout, num_steps=asked.num_steps)
    if asked.guidance is not None:
        asks: dict[str, Any] = {guidance_key(config): asked.guidance}
        model = dataclasses.replace(model, **asks)
    return dataclasses.replace(config, rollout=rollout, model=model)


def sampled_with(config: Config) -> dict[str, Any]:
    """What the images of `as_evaluated` are made with, for their record: ``num_steps`` and ``guidance``.

    Raises UserError as it does.
    """
    config = as_evaluated(config)
    return {"num_steps": config.rollout.num_steps, "guidance": getattr(config.model, guidance_key(config))}


def in_words(config: Config) -> str:
    """`sampled_with` in a sentence: ``25 steps, guidance 3.5``, or ``true_cfg_scale``."""
    found = sampled_with(config)
    return f"{found['num_steps']} steps, {guidance_key(config)} {found['guidance']:g}"


def guidance_key(config: Config) -> str:
    """The key of ``config.model`` that guidance has in this model. Raises UserError as `as_evaluated`."""
    return "guidance" if takes_guidance(resolve(config.model.path)) else "true_cfg_scale"
