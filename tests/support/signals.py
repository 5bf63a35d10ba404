"""Signals sent at a known moment of a run."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from leapalign.runs.run_folder import MetricsLog


def signalled_in(monkeypatch: pytest.MonkeyPatch, iteration: int, *numbers: signal.Signals) -> None:
    """Signals come as the metrics of ``iteration`` are written."""
    write = MetricsLog.write

    def write_and_signal(self: MetricsLog, record: Any) -> None:
        write(self, record)
        if record["iteration"] == iteration:
            for number in numbers:
                signal.raise_signal(number)

    monkeypatch.setattr(MetricsLog, "write", write_and_signal)
