"""The run folder's records: metrics, and what the watch measured, as JSON lines and TensorBoard events."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from leapalign.storage.durable import writing
from leapalign.storage.faults import point
from leapalign.storage.json_lines import read_records, write_records
from leapalign.watch.records import read_watch, replace_watch

METRICS = "metrics.jsonl"
INCIDENTS = "incidents.jsonl"


def read_metrics(run: Path) -> list[dict[str, float]]:
    """All complete lines of the run's metrics, oldest first; empty where there are none."""
    return read_records(run / METRICS)


def later_samples(run: Path, iteration: int) -> list[Path]:
    """Sample grids of iterations after ``iteration``."""
    found = {path: path.stem.removeprefix("step-") for path in (run / "samples").glob("step-*.png")}
    return [path for path, number in found.items() if number.isdecimal() and int(number) > iteration]


class MetricsLog:
    """Appends one record per iteration; entering it drops what lies beyond ``iteration`` (a resumed run redoes it).

    The watch's record of iteration 0 is made again as long as there is no iteration after it.
    """

    def __init__(self, run: Path, iteration: int) -> None:
        self._run, self._iteration = run, iteration

    def __enter__(self) -> MetricsLog:
        for path in (self._run / METRICS, self._run / INCIDENTS):
            if path.exists() or path.name == METRICS:
                write_records(path, [one for one in read_records(path) if one["iteration"] <= self._iteration])
        path = self._run / METRICS
        dropped = self._iteration + 1 if self._iteration else 0
        watched = read_watch(self._run)
        if watched:
            replace_watch(self._run, [record for record in watched if record["iteration"] < dropped])
        with writing(path):
            self._file = path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(self._run / "tensorboard"), purge_step=dropped)
        return self

    def write(self, record: Mapping[str, float]) -> None:
        """Appends ``record``, which is on the disk on return. Raises UserError where it cannot be written."""
        with writing(self._run / METRICS):
            point("metrics")
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            point("metrics")
            os.fsync(self._file.fileno())
            self._show(record)
            point("metrics")

    def write_incidents(self, incidents: Sequence[Mapping[str, Any]]) -> None:
        """Appends to ``incidents.jsonl`` what is known of samples and iterations that were skipped, as `write`."""
        if incidents:
            with writing(self._run / INCIDENTS), (self._run / INCIDENTS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(incident) + "\n" for incident in incidents)
                file.flush()
                os.fsync(file.fileno())

    def write_watch(self, record: dict[str, float]) -> None:
        """Appends what the watch measured, as `write`."""
        replace_watch(self._run, [*read_watch(self._run), record])
        with writing(self._run / "tensorboard"):
            self._show(record, "watch/")

    def _show(self, record: Mapping[str, float], prefix: str = "") -> None:
        for name, value in record.items():
            if name != "iteration":
                self._events.add_scalar(f"{prefix}{name}", value, int(record["iteration"]))
        self._events.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with writing(self._run / METRICS):
            self._file.close()
            self._events.close()


class NoLog(MetricsLog):
    """That of a process which leaves writing to the first one."""

    def __enter__(self) -> NoLog:
        return self

    def write(self, record: Mapping[str, float]) -> None:
        pass

    def write_incidents(self, incidents: Sequence[Mapping[str, Any]]) -> None:
        pass

    def write_watch(self, record: dict[str, float]) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass
