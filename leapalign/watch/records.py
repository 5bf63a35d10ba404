"""``watch.jsonl``: what the watch measured, one JSON object a line, oldest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from leapalign.storage.json_lines import read_records, write_records

FILE = "watch.jsonl"


def read_watch(run: Path) -> list[dict[str, float]]:
    """All records; empty where there are none."""
    return read_records(run / FILE)


def replace_watch(run: Path, records: Sequence[dict[str, float]]) -> None:
    """Replaces the records, which are on the disk on return. Raises UserError."""
    write_records(run / FILE, records)


def ranked(run: Path, metric: str) -> list[int]:
    """The iterations that were measured, that of the highest ``metric`` first; of equals, the earlier."""
    values = {int(record["iteration"]): record.get(metric, math.nan) for record in read_watch(run)}
    return sorted((n for n, value in values.items() if math.isfinite(value)), key=lambda n: (-values[n], n))
