"""Says when a threshold does not suit the reward: on the wrong scale, it stops training, or never does anything."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from leapalign.reward_gradient import RewardTerm

_log = logging.getLogger("leapalign")


def warn_of_thresholds(terms: Sequence[RewardTerm], metrics: Mapping[str, float]) -> None:
    """Warns where a mean reward of the first batch, in ``metrics``, has reached its threshold, or nothing can."""
    for term in terms:
        mean = metrics[f"reward_{term.name}" if len(terms) > 1 else "reward"]
        warn_of_threshold(term.threshold, mean, getattr(term.reward, "highest", None))


def warn_of_threshold(threshold: float, mean: float, highest: float | None) -> None:
    """Warns where the first batch's ``mean`` reward has reached ``threshold``, or nothing can.

    highest: a score that no image exceeds, where the reward tells.
    """
    if threshold <= mean:
        _log.warning(
            "threshold %.4g is not above the first batch's mean reward %.4g: images that reach it carry no gradient; "
            "raise threshold, or choose the reward's scale that it refers to",
            threshold,
            mean,
        )
    elif highest is not None and threshold > highest:
        _log.warning(
            "threshold %.4g is above %.4g, the highest that the reward can give: no image will ever reach it; lower "
            "threshold, or choose the reward's scale that it refers to",
            threshold,
            highest,
        )
