"""Settings of the runs that one process and several are to make alike."""

from __future__ import annotations

from pathlib import Path

from small_runs import config_of

from leapalign.config import Config

SETTINGS = ("optimizer.learning_rate=1e-4", "train.iterations=4", "checkpoint.every=2", "ema.decay=0.9")


def config(parts: Path, run: Path, *assignments: str) -> Config:
    return config_of(parts, run, *SETTINGS, *assignments)
