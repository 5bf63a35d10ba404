"""Trains what ``arms.yaml`` declares, and reports it.

    python -m benchmarks.study run --workers 2     # goes on where it was; a training that was cut off begins again
    python -m benchmarks.study table               # what is known so far
    python -m benchmarks.study page                # the same, written into docs/study.md
    python -m benchmarks.study plot                # the figure, and what arms draw, into docs

A line of ``benchmarks/results/study.jsonl`` is a measurement. Learning rates first: an arm is compared when its own is
chosen.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.study.figure import draw
from benchmarks.study.pictures import BASE, rows
from benchmarks.study.plan import Records, Study, Training, comparisons, is_done, validations
from benchmarks.study.tables import filled, tables
from benchmarks.study.training import all_measured, paper_units

RESULTS = Path(__file__).parents[1] / "results" / "study.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "study.md"


def read(results: Path) -> list[dict[str, Any]]:
    """The lines of trainings that came to their end."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def wanted(study: Study, records: Records) -> list[Training]:
    """What is not done yet and can begin: arms that have their learning rate, seed by seed, so that an early end leaves
    a fair picture of these; the choice of the others' rates, arm by arm; then ablations, seed by seed."""
    compared, ablated = (
        [training for arm in arms for training in comparisons(study, arm, records)]
        for arms in (study.arms, study.ablations)
    )
    for trainings in (compared, ablated):
        trainings.sort(key=lambda training: study.seeds.index(training.seed))
    validating = [training for arm in study.arms for training in validations(study, arm, records)]
    return [training for training in (*compared, *validating, *ablated) if not is_done(records, training)]


def run(study: Study, workers: int, hours: float) -> None:
    records, until = read(RESULTS), time.monotonic() + 3600 * hours
    budget = paper_units(study)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: dict[Future[list[dict[str, Any]]], Training] = {}
        while True:
            waiting = [training for training in wanted(study, records) if training not in running.values()]
            while waiting and len(running) < workers and time.monotonic() < until:
                training = waiting.pop(0)
                running[pool.submit(all_measured, study, training, budget)] = training
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                training, lines = running.pop(future), future.result()
                records += lines
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                last = lines[-1]
                print(
                    f"{training.arm}, rate {training.rate:g}, seed {training.seed}: reward {last['reward']:.3f}, "
                    f"held out {last['held_out_reward']:.3f}, exact {last['exact']:.3f}, {last['cpu_seconds']:.0f} s; "
                    f"{len(wanted(study, records))} known to be left",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "page", "plot"])
    parser.add_argument("--workers", type=int, default=1, help="trainings at once, of one thread each")
    parser.add_argument("--hours", type=float, default=24.0, help="begin no training after so many")
    arguments = parser.parse_args()
    study = Study.read()
    if arguments.command == "run":
        run(study, arguments.workers, arguments.hours)
    elif arguments.command == "table":
        print(tables(study, read(RESULTS)))
    elif arguments.command == "plot":
        draw(study, read(RESULTS), PAGE.with_suffix(".png"))
        rows([BASE, *study.arms]).save(PAGE.with_name("study_pictures.png"))
    else:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), study, read(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
