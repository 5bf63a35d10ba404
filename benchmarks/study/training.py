"""One training of the study, and what is measured on its way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.pictures import BASE, save_strip
from benchmarks.study.plan import Study, Training, validations
from benchmarks.study.units import Units
from leapalign.config import load_config
from leapalign.models import encode_prompts
from leapalign.streams import EVALUATION_STREAM, seed_of
from leapalign.tiny.critic import embedded_critic
from leapalign.tiny.evaluate import RULES, Evaluation, evaluate
from leapalign.tiny.world import balanced_prompts, split_prompts
from leapalign.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def trainer_of(study: Study, training: Training) -> Trainer:
    kind: Any = Trainer
    if training.arm in study.trainers:
        module, name = study.trainers[training.arm].split(":")
        kind = getattr(import_module(f"benchmarks.study.{module}"), name)
    # Far longer than any training: the schedule is constant.
    trainer: Trainer = kind.from_config(load_config(TINY, [*training.settings, "train.iterations=100000"]))
    return trainer


def due_at(study: Study, training: Training, budget: float, units: float) -> dict[str, int]:
    """The iterations after which ``training``, whose iteration takes ``units``, is measured: at the paper's
    "rollouts", and, where it is compared at other budgets, at "half units" and all "units" of ``budget``."""
    due = {"rollouts": training.iterations}
    if training.arm in study.arms and training.seed in study.seeds:
        due |= {"half units": max(round(budget / 2 / units), 1), "units": max(round(budget / units), 1)}
    return due


Line = tuple[dict[str, Any], Evaluation]
"""A line of the results, and what was evaluated for it."""


def measured(study: Study, training: Training, budget: float) -> Iterator[Line]:
    """Trains, and yields what is measured on the way (`due_at`); of the paper's recipe at the "start", too, which all
    arms share. ``train_reward``: of each rollout since the line before. Seconds are the processor's, of training."""
    trainer = trainer_of(study, training)
    held_out = Measurement(training, trainer)
    units, seconds = Units(trainer.model.transformer), 0.0
    if training.arm == study.paper and training.seed in study.seeds:
        yield held_out.record(training, at=["start"], units=0.0, cpu_seconds=0.0, done=False)
    units.total = 0.0
    due: dict[str, int] = {}
    rewards: list[float] = []
    while True:
        started = time.process_time()
        metrics = trainer.train_one()
        trainer.iteration += 1
        seconds += time.process_time() - started
        counted = units.total
        rewards.append(round(metrics["reward"], 4))
        due = due or due_at(study, training, budget, counted)
        at = [name for name, iteration in due.items() if iteration == trainer.iteration]
        if at:
            done = trainer.iteration == max(due.values())
            known = {"at": at, "units": counted, "cpu_seconds": round(seconds, 2), "done": done}
            yield held_out.record(training, **known, grad_norm=metrics["grad_norm"], train_reward=rewards)
            units.total, rewards = counted, []
            if done:
                return


def all_measured(study: Study, training: Training, budget: float) -> list[dict[str, Any]]:
    """All of `measured`, by one thread: for a process of its own. The first seed's pictures are kept."""
    torch.set_num_threads(1)
    lines = []
    for line, found in measured(study, training, budget):
        lines.append(line)
        if training.seed == study.seeds[0]:
            for at in {"start", "units"}.intersection(line["at"]):
                save_strip(found.images, training.arm if at == "units" else BASE)
    return lines


class Measurement:
    """Held-out prompts and their noise, the same for every arm of a seed."""

    def __init__(self, training: Training, trainer: Trainer) -> None:
        self._trainer = trainer
        self._prompts = balanced_prompts(split_prompts()[1], training.images)
        self._embeddings = encode_prompts(trainer.config.model, [prompt.text for prompt in self._prompts])
        self._seed = seed_of(training.seed, EVALUATION_STREAM, 0)
        self._rewards = {"reward": trainer.rewards[0].reward, "held_out_reward": embedded_critic()}

    def record(self, training: Training, **known: Any) -> Line:
        """By the weight average."""
        trainer = self._trainer
        with trainer.optimizer.averaged_weights(), torch.no_grad():
            found = evaluate(trainer.model, self._embeddings, self._prompts, self._seed, self._rewards)
        return {**training.to_json(), "iteration": trainer.iteration, **known, **figures(found)}, found


def figures(found: Evaluation) -> dict[str, Any]:
    """Means over images, fit for JSON."""
    return {
        **{name: found.score(name).mean for name in found.scores},
        **{rule: found.accuracy(rule).mean for rule in RULES},
        "tidy": found.untidiness().mean,
        "diversity": found.diversity(),
        "exact_by_family": found.by_family(),
    }


def paper_units(study: Study) -> float:
    """Forward units of the paper's recipe."""
    trainer = trainer_of(study, validations(study, study.paper, [])[0])
    units = Units(trainer.model.transformer)
    trainer.train_one()
    return units.total * study.iterations
