"""What the results say, arm by arm, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.plan import Records, Study, chosen_rate, comparisons, of_training
from benchmarks.tables import markdown
from leapalign.evaluation.statistics import mean_interval

FIGURES = {
    "reward": "reward",
    "held_out_reward": "held-out reward",
    "exact": "exact",
    "lenient": "lenient",
    "clean": "clean",
    "tidy": "untidy",
    "diversity": "diversity",
}
COMPARED = ("reward", "held_out_reward", "exact", "diversity")
BUDGETS = {
    "rollouts": "At equal rollouts",
    "units": "At equal forward units",
    "half units": "At half the forward units, beside the paper's recipe with all of its own",
}
PLACE = re.compile(r"<!-- study -->\n.*<!-- end of study -->", re.S)

Lines = Mapping[int, Mapping[str, Any]]
"""Measurements by seed."""


def filled(document: str, study: Study, records: Records) -> str:
    """``document`` with the tables between its two marks."""
    return PLACE.sub(lambda _: f"<!-- study -->\n{tables(study, records)}\n<!-- end of study -->", document)


def tables(study: Study, records: Records) -> str:
    """For each budget means over seeds with 95 % intervals, and the differences to the paper's recipe, seed by seed."""
    parts = []
    for at, title in BUDGETS.items():
        found = {arm: measured(study, records, arm, at) for arm in study.arms}
        base = measured(study, records, study.paper, "start")
        parts.append(f"### {title}\n\n{_means(study, records, {'before training': base, **found})}")
        paper = measured(study, records, study.paper, "rollouts")
        others = {arm: lines for arm, lines in found.items() if arm != study.paper}
        parts.append(f"Less that of `{study.paper}` at its end, seed by seed:\n\n{_differences(others, paper)}")
    return "\n\n".join(parts)


def measured(study: Study, records: Records, arm: str, at: str) -> Lines:
    """What ``arm`` has reached ``at`` a budget."""
    trainings = comparisons(study, arm, records)
    return {one.seed: line for one in trainings for line in of_training(records, one) if at in line["at"]}


def _means(study: Study, records: Records, found: Mapping[str, Lines]) -> str:
    rows = []
    for arm, lines in found.items():
        if lines:
            units = mean_interval([line["units"] for line in lines.values()]).mean
            # The first lines have those of the clock, in which trainings were paused.
            known_seconds = [line["cpu_seconds"] for line in lines.values() if "cpu_seconds" in line]
            seconds = f"{mean_interval(known_seconds).mean:.0f}" if known_seconds else ""
            rate = chosen_rate(study, arm, records) if arm in study.arms else None
            iterations = next(iter(lines.values()))["iteration"]
            known = ["" if rate is None else f"{rate:g}", str(len(lines)), str(iterations), f"{units / 1000:.1f}"]
            rows.append([arm, *known, seconds, *(_mean(lines.values(), figure) for figure in FIGURES)])
    header = ["arm", "rate", "seeds", "iterations", "thousand units", "CPU seconds", *FIGURES.values()]
    return markdown(header, rows)


def _mean(lines: Any, figure: str) -> str:
    places = 4 if figure == "tidy" else 3
    found = mean_interval([line[figure] for line in lines])
    return f"{found.mean:.{places}f} ± {found.high - found.mean:.{places}f}"


def _differences(others: Mapping[str, Lines], paper: Lines) -> str:
    rows = []
    for arm, lines in others.items():
        seeds: Sequence[int] = [seed for seed in lines if seed in paper]
        if len(seeds) > 1:
            columns = [mean_interval([lines[seed][name] - paper[seed][name] for seed in seeds]) for name in COMPARED]
            rows.append(
                [arm, str(len(seeds)), *(f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for one in columns)]
            )
    return markdown(["arm", "seeds", *(FIGURES[name] for name in COMPARED)], rows)
