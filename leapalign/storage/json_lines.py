"""Records as JSON lines, one object a line, oldest first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from leapalign.storage.durable import write_text


def read_records(path: Path) -> list[dict[str, Any]]:
    """All complete lines; empty where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a line without its end was cut by a crash
    return [json.loads(line) for line in lines]


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the records, which are on the disk on return. Raises UserError."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
