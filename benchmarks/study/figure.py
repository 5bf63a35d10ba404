"""The study in one figure: the reward of each rollout over forward units, and where arms end at equal units."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.study.pictures import BASE
from benchmarks.study.plan import Records, Study, comparisons, of_training
from benchmarks.study.tables import measured
from leapalign.evaluation.statistics import mean_interval
from leapalign.reports.pictures import smoothed

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WINDOW = 7
"""Iterations that a point of a curve is the mean of."""


def draw(study: Study, records: Records, path: Path) -> None:
    """Save the figure as a PNG; arms without results are left out."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    colors = {arm: plt.get_cmap("tab20")(number) for number, arm in enumerate(study.arms)}
    for arm in study.arms:
        courses = _courses(study, records, arm)
        if courses:
            length = min(len(rewards) for _, rewards in courses)
            mean = smoothed(np.mean([rewards[:length] for _, rewards in courses], axis=0).tolist(), WINDOW)
            each = float(np.mean([units for units, _ in courses]))
            left.plot(each * np.arange(1, length + 1) / 1000, mean, color=colors[arm], linewidth=1.4)
    left.set_xlabel("thousand forward units")
    left.set_ylabel("reward of a rollout, mean over seeds")
    left.grid(alpha=0.25)
    names = [arm for arm in (BASE, *study.arms) if measured(study, records, arm, "units")]
    for place, arm in enumerate(names):
        found = mean_interval([line["exact"] for line in measured(study, records, arm, "units").values()])
        bars = [[found.mean - found.low], [found.high - found.mean]]
        right.errorbar([found.mean], [-place], xerr=bars, fmt="o", color=colors.get(arm, "black"), capsize=3)
    right.set_yticks([-place for place in range(len(names))], names)
    right.set_xlabel("exact at equal forward units, mean and 95 % interval")
    right.set_xlim(0.3, 1)
    right.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _courses(study: Study, records: Records, arm: str) -> list[tuple[float, list[float]]]:
    """Of each seed: units of an iteration, and the reward of each rollout."""
    found = []
    for training in comparisons(study, arm, records):
        lines = sorted(of_training(records, training), key=lambda line: int(line["iteration"]))
        rewards = [reward for line in lines for reward in line.get("train_reward", [])]
        if rewards:
            found.append((lines[-1]["units"] / lines[-1]["iteration"], rewards))
    return found
