"""What the results say, arm by arm."""

from __future__ import annotations

from benchmarks.study.plan import Records, Study, chosen_rate, comparisons, of_training
from leapalign.evaluation.statistics import mean_interval
from leapalign.reports.pages import text_table

FIGURES = ("reward", "held_out_reward", "exact", "lenient", "clean", "tidy", "diversity")
COLUMNS = ("arm", "rate", "seeds", "iterations", "units", "s", *FIGURES)
TITLES = {"start": "before training", "rollouts": "at equal rollouts", "units": "at equal forward units"}


def tables(study: Study, records: Records) -> str:
    """Means over seeds with 95 % intervals."""
    return "\n\n".join(f"{title}\n{text_table(COLUMNS, rows(study, records, at))}" for at, title in TITLES.items())


def rows(study: Study, records: Records, at: str) -> list[list[str]]:
    """Of each arm that has any, its measurements ``at`` one budget."""
    found = []
    for arm in study.arms:
        trainings = comparisons(study, arm, records)
        lines = [line for one in trainings for line in of_training(records, one) if at in line["at"]]
        if lines:
            columns = [str(mean_interval([line[figure] for line in lines])) for figure in FIGURES]
            units, seconds = (mean_interval([line[name] for line in lines]).mean for name in ("units", "seconds"))
            count, iterations = f"{len(lines)}", f"{lines[0]['iteration']}"
            rate = chosen_rate(study, arm, records)
            found.append([arm, f"{rate:g}", count, iterations, f"{units:.0f}", f"{seconds:.0f}", *columns])
    return found
