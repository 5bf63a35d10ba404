"""The demo over several seeds, its results kept as JSON lines and pooled.

    python benchmarks/tiny_study.py --seeds 0 1 2                      # section.key=value overrides may follow

Each seed is one ``leapalign demo`` in a process of its own. Appends a line a run to ``results/tiny_study.jsonl``
and prints the pooled mean of each figure with its 95 % interval over all images of all seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from leapalign.evaluation.statistics import Interval
from leapalign.reports.pages import text_table
from leapalign.tiny.world import FAMILIES

RESULTS = Path(__file__).parent / "results" / "tiny_study.jsonl"
FIGURES = ("reward", "held_out_reward", "exact", "lenient", "clean", "tidy")
ARMS = ("before", "after", "control")


def run_seed(seed: int, overrides: list[str]) -> dict[str, Any]:
    """The result of one demo, with what it ran on."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "leapalign.cli", "demo", "--json", f"seed={seed}", f"output={folder}/run"]
        shown = subprocess.run([*command, *overrides], check=True, stdout=subprocess.PIPE, text=True).stdout
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = json.loads(shown.splitlines()[-1])
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {**result, "seed": seed, "overrides": overrides, "revision": revision, "versions": versions}


def pooled(intervals: list[dict[str, float]]) -> Interval:
    """The mean over seeds of equally many images each; half widths add as standard errors do."""
    count = len(intervals)
    mean = sum(interval["mean"] for interval in intervals) / count
    half = sum(((interval["high"] - interval["low"]) / 2) ** 2 for interval in intervals) ** 0.5 / count
    return Interval(mean, mean - half, mean + half)


def _exact_in(family: str, found: dict[str, Any]) -> float:
    share: float = found["exact_by_family"][family]
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, overrides = parser.parse_known_args()
    RESULTS.parent.mkdir(exist_ok=True)
    results = []
    for seed in arguments.seeds:
        results.append(run_seed(seed, overrides))
        with RESULTS.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    rows = [
        [figure, *(str(pooled([result["detail"][arm][figure] for result in results])) for arm in ARMS)]
        for figure in FIGURES
    ]
    plain: dict[str, Callable[[dict[str, Any]], float]] = {"diversity": lambda found: found["diversity"]}
    plain |= {f"exact, {family}": partial(_exact_in, family) for family in FAMILIES}
    for name, read in plain.items():
        rows.append([name, *(f"{mean(read(result['detail'][arm]) for result in results):.3f}" for arm in ARMS)])
    print(text_table(("", *ARMS), rows))
    for result in results:
        before, after, of = (result["grid"][key] for key in ("right_before", "right_after", "of"))
        print(f"seed {result['seed']}: of {of} shown {before} are right before, {after} after")
    print(f"{len(results)} seeds, {sum(result['seconds'] for result in results) / len(results):.0f} s a demo")


if __name__ == "__main__":
    main()
