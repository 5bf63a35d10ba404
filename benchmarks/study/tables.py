"""What the results say, arm by arm, in Markdown."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.pictures import BASE
from benchmarks.study.plan import Records, Study, chosen_rate, comparisons, of_training
from benchmarks.tables import markdown
from leapalign.evaluation.statistics import Interval, mean_interval

FIGURES = {
    "reward": "reward",
    "held_out_reward": "held-out reward",
    "exact": "exact",
    "lenient": "lenient",
    "clean": "clean",
    "tidy": "untidy",
    "diversity": "diversity",
}
COMPARED = ("reward", "held_out_reward", "exact", "tidy", "diversity")
BUDGETS = {"rollouts": "equal rollouts", "units": "equal forward units", "half units": "half the forward units"}
FEWEST = 3
"""Seeds of an interval that is shown: two that agree by chance would have none."""
PLACE = re.compile(r"<!-- study -->\n.*<!-- end of study -->", re.S)

Lines = Mapping[int, Mapping[str, Any]]
"""Measurements by seed."""


def filled(document: str, study: Study, records: Records) -> str:
    """``document`` with the tables between its two marks."""
    return PLACE.sub(lambda _: f"<!-- study -->\n{tables(study, records)}\n<!-- end of study -->", document)


def tables(study: Study, records: Records) -> str:
    """For each budget means over seeds with 95 % intervals, and differences to the paper's recipe, seed by seed; then
    the units that arms take to its end, the paper's claims, ablations and families."""
    less = f"Less that of `{study.paper}` after {study.iterations} iterations, seed by seed, with 95 % intervals:"
    parts = []
    for at, title in BUDGETS.items():
        found = {arm: measured(study, records, arm, at) for arm in study.arms}
        shown = {BASE: measured(study, records, BASE, at), **found}
        own = {arm: lines for arm, lines in found.items() if arm != study.paper or at == "half units"}
        differences = _difference_table(own, measured(study, records, study.paper, "rollouts"))
        parts.append(f"### At {title}\n\n{_means(study, records, shown)}\n\n{less}\n\n{differences}")
    ablated = {arm: measured(study, records, arm, "rollouts") for arm in study.ablations}
    paper = measured(study, records, study.paper, "rollouts")
    parts += [
        f"### Units to where the paper's recipe ends\n\n{_reaching(study, records)}",
        f"### What the paper says, what we see\n\n{_claims(study, records)}",
        f"### Ablations\n\n{less}\n\n{_difference_table(ablated, paper)}",
        f"### Exact, by family of prompts, at equal forward units\n\n{_families(study, records)}",
    ]
    return "\n\n".join(parts)


def measured(study: Study, records: Records, arm: str, at: str) -> Lines:
    """What ``arm`` has reached ``at`` a budget; `BASE` is where the paper's recipe starts."""
    if arm == BASE:
        arm, at = study.paper, "start"
    trainings = comparisons(study, arm, records)
    return {one.seed: line for one in trainings for line in of_training(records, one) if at in line["at"]}


def difference(lines: Lines, others: Lines, figure: str) -> Interval | None:
    """Of ``figure``, seed by seed; none of fewer than `FEWEST`."""
    seeds: Sequence[int] = [seed for seed in lines if seed in others]
    return (
        mean_interval([lines[seed][figure] - others[seed][figure] for seed in seeds]) if len(seeds) >= FEWEST else None
    )


def units_to(study: Study, records: Records, arm: str, figures: Sequence[str]) -> dict[int, float]:
    """By seed, the share of the paper's forward units after which ``arm`` has what the paper's recipe ends with, in all
    of ``figures``: between two measurements linearly. A seed that has not by its last is infinite."""
    targets, starts = measured(study, records, study.paper, "rollouts"), measured(study, records, BASE, "start")
    found: dict[int, float] = {}
    for training in comparisons(study, arm, records):
        seed, lines = training.seed, list(of_training(records, training))
        if seed in targets and any(line["done"] for line in lines):
            begin = {**starts[seed], "units": 0.0}
            course = [begin, *sorted((line for line in lines if line["units"]), key=lambda line: line["units"])]
            reached = [_crossing(course, figure, targets[seed][figure]) for figure in figures]
            found[seed] = max(reached) / targets[seed]["units"]
    return found


def _crossing(course: Sequence[Mapping[str, Any]], figure: str, target: float) -> float:
    for before, after in itertools.pairwise(course):
        if after[figure] >= target:
            share = max(target - before[figure], 0) / max(after[figure] - before[figure], 1e-12)
            return float(before["units"] + share * (after["units"] - before["units"]))
    return float("inf")


def _reaching(study: Study, records: Records) -> str:
    rows = []
    for arm in study.arms:
        columns = []
        found = [units_to(study, records, arm, figures) for figures in (["reward"], ["exact"], ["reward", "exact"])]
        for shares in found:
            reached = [share for share in shares.values() if share < float("inf")]
            all_of_them = len(reached) == len(shares) >= FEWEST
            columns.append(_shown(mean_interval(reached), "") if all_of_them else f"{len(reached)} of {len(shares)}")
        if found[0]:
            rows.append([arm, *columns])
    return markdown(["arm", "reward", "exact", "both"], rows)


def _claims(study: Study, records: Records) -> str:
    rows = []
    for better, worse in study.claims:
        columns = []
        for at in ("rollouts", "units"):
            lines = measured(study, records, better, "rollouts")
            others = measured(study, records, worse, at)
            for figure in ("reward", "exact"):
                columns.append(_judged(difference(lines, others, figure)))
        if any(columns):
            rows.append([f"{better} > {worse}", *columns])
    header = [
        "the paper",
        *(f"{figure}, {BUDGETS[at]}" for at in ("rollouts", "units") for figure in ("reward", "exact")),
    ]
    return markdown(header, rows)


def _judged(found: Interval | None) -> str:
    if found is None:
        return ""
    holds = "holds" if found.low > 0 else "the reverse" if found.high < 0 else "open"
    return f"{holds}: {_shown(found)}"


def _shown(found: Interval, sign: str = "+", places: int = 3) -> str:
    form = f"{sign}.{places}f"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _means(study: Study, records: Records, found: Mapping[str, Lines]) -> str:
    rows = []
    for arm, lines in found.items():
        if lines:
            units, seconds = (
                mean_interval([line[name] for line in lines.values()]).mean for name in ("units", "cpu_seconds")
            )
            rate = chosen_rate(study, arm, records) if arm in study.arms else None
            iterations = next(iter(lines.values()))["iteration"]
            known = ["" if rate is None else f"{rate:g}", str(len(lines)), str(iterations), f"{units / 1000:.1f}"]
            rows.append([arm, *known, f"{seconds:.0f}", *(_mean(lines.values(), figure) for figure in FIGURES)])
    header = ["arm", "rate", "seeds", "iterations", "thousand units", "CPU seconds", *FIGURES.values()]
    return markdown(header, rows)


def _places(figure: str) -> int:
    return 4 if figure == "tidy" else 3


def _mean(lines: Iterable[Mapping[str, Any]], figure: str) -> str:
    found = mean_interval([line[figure] for line in lines])
    return f"{found.mean:.{_places(figure)}f} ± {found.high - found.mean:.{_places(figure)}f}"


def _difference_table(others: Mapping[str, Lines], paper: Lines) -> str:
    rows = []
    for arm, lines in others.items():
        columns = {figure: difference(lines, paper, figure) for figure in COMPARED}
        shown = [_shown(one, places=_places(figure)) for figure, one in columns.items() if one is not None]
        if shown:
            rows.append([arm, str(len([seed for seed in lines if seed in paper])), *shown])
    return markdown(["arm", "seeds", *(FIGURES[name] for name in COMPARED)], rows)


def _families(study: Study, records: Records) -> str:
    found = {BASE: measured(study, records, BASE, "start")}
    found |= {arm: measured(study, records, arm, "units") for arm in study.arms}
    names: list[str] = []
    rows = []
    for arm, lines in found.items():
        if lines:
            names = list(next(iter(lines.values()))["exact_by_family"])
            shares = [[line["exact_by_family"][name] for line in lines.values()] for name in names]
            rows.append([arm, *(f"{mean_interval(share).mean:.2f}" for share in shares)])
    return markdown(["arm", *names], rows)
