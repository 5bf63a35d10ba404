"""Means with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent ``values``; a single value has no width."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, mean, mean)
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def share_interval(passed: Sequence[bool]) -> Interval:
    """Wilson interval of a share, which stays inside [0, 1]."""
    result = stats.binomtest(int(np.sum(passed)), len(passed)).proportion_ci(method="wilson")
    return Interval(float(np.mean(passed)), float(result.low), float(result.high))
