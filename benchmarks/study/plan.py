"""The declaration in ``arms.yaml``, and the trainings that it asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

DECLARATION = Path(__file__).parent / "arms.yaml"


@dataclass(frozen=True)
class Study:
    """What ``arms.yaml`` declares: see there."""

    paper: str
    iterations: int
    images: int
    rates: Sequence[float]
    validation_seeds: Sequence[int]
    seeds: Sequence[int]
    settings: Sequence[str]
    arms: Mapping[str, Sequence[str]]
    ablation_seeds: Sequence[int] = ()
    ablations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    claims: Sequence[tuple[str, str]] = ()
    trainers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path = DECLARATION) -> Study:
        return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Training:
    """One training of one arm."""

    arm: str
    rate: float
    seed: int
    iterations: int
    images: int
    settings: tuple[str, ...]
    """All that is laid over ``configs/tiny.yaml``."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "settings": list(self.settings)}


Records = Sequence[Mapping[str, Any]]
"""Lines of the results: a `Training`, how far it had come, and what was measured there."""


def validations(study: Study, arm: str, records: Records) -> list[Training]:
    """By which ``arm`` chooses its learning rate, as far as ``records`` tell: the two rates in the middle, and, while
    the best of those tried is at their end, the next one there."""
    last = len(study.rates) - 1
    low, high = max((last - 1) // 2, 0), min((last + 1) // 2, last)
    while True:
        tried = study.rates[low : high + 1]
        scores = {rate: _score(study, arm, rate, records) for rate in tried}
        known = [score for score in scores.values() if score is not None]
        best = max(known, default=None)
        if len(known) == len(tried) and high < last and scores[tried[-1]] == best:
            high += 1
        elif len(known) == len(tried) and low > 0 and scores[tried[0]] == best:
            low -= 1
        else:
            pairs = itertools.product(tried, study.validation_seeds)
            return [_training(study, arm, study.arms[arm], rate, seed) for rate, seed in pairs]


def chosen_rate(study: Study, arm: str, records: Records) -> float | None:
    """The learning rate of the highest mean held-out reward after ``study.iterations``, on the validation seeds; none
    before all of `validations` are there."""
    scores = {one.rate: _score(study, arm, one.rate, records) for one in validations(study, arm, records)}
    known = {rate: score for rate, score in scores.items() if score is not None}
    return max(known, key=lambda rate: known[rate]) if len(known) == len(scores) else None


def _score(study: Study, arm: str, rate: float, records: Records) -> float | None:
    found = []
    for seed in study.validation_seeds:
        training = _training(study, arm, study.arms[arm], rate, seed)
        found += [one["held_out_reward"] for one in of_training(records, training) if "rollouts" in one["at"]]
    return mean(found) if len(found) == len(study.validation_seeds) else None


def comparisons(study: Study, arm: str, records: Records) -> list[Training]:
    """Of ``arm`` at its learning rate, or of an ablation at that of the paper's recipe; none before it is chosen."""
    ablated = arm in study.ablations
    rate = chosen_rate(study, study.paper if ablated else arm, records)
    settings = study.ablations[arm] if ablated else study.arms[arm]
    seeds = study.ablation_seeds if ablated else study.seeds
    return [] if rate is None else [_training(study, arm, settings, rate, seed) for seed in seeds]


def _training(study: Study, arm: str, own: Sequence[str], rate: float, seed: int) -> Training:
    settings = (*study.settings, *own, f"optimizer.learning_rate={rate!r}", f"seed={seed}")
    return Training(arm, rate, seed, study.iterations, study.images, settings)


def of_training(records: Records, training: Training) -> Iterator[Mapping[str, Any]]:
    """What is known of ``training``, as it is declared today."""
    asked = training.to_json()
    return (record for record in records if all(record[key] == value for key, value in asked.items()))


def is_done(records: Records, training: Training) -> bool:
    return any(record["done"] for record in of_training(records, training))
