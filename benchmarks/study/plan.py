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


def validations(study: Study, arm: str) -> list[Training]:
    """By which ``arm`` chooses its learning rate."""
    pairs = itertools.product(study.rates, study.validation_seeds)
    return [_training(study, arm, rate, seed) for rate, seed in pairs]


def comparisons(study: Study, arm: str, records: Records) -> list[Training]:
    """Of ``arm`` at its learning rate; none before all of `validations` are there."""
    rate = chosen_rate(study, arm, records)
    return [] if rate is None else [_training(study, arm, rate, seed) for seed in study.seeds]


def _training(study: Study, arm: str, rate: float, seed: int) -> Training:
    settings = (*study.settings, *study.arms[arm], f"optimizer.learning_rate={rate!r}", f"seed={seed}")
    return Training(arm, rate, seed, study.iterations, study.images, settings)


def chosen_rate(study: Study, arm: str, records: Records) -> float | None:
    """The learning rate of the highest mean held-out reward after ``study.iterations``, on the validation seeds."""
    found: dict[float, list[float]] = {rate: [] for rate in study.rates}
    for training in validations(study, arm):
        for record in of_training(records, training):
            if "rollouts" in record["at"]:
                found[training.rate].append(record["held_out_reward"])
    if any(len(values) < len(study.validation_seeds) for values in found.values()):
        return None
    return max(found, key=lambda rate: mean(found[rate]))


def of_training(records: Records, training: Training) -> Iterator[Mapping[str, Any]]:
    """What is known of ``training``, as it is declared today."""
    asked = training.to_json()
    return (record for record in records if all(record[key] == value for key, value in asked.items()))


def is_done(records: Records, training: Training) -> bool:
    return any(record["done"] for record in of_training(records, training))
