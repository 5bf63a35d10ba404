"""How a command line names a run: its folder, a checkpoint in it, or ``latest``."""

from __future__ import annotations

import re
from pathlib import Path

from leapalign.inputs.validation import UserError
from leapalign.runs.run_folder import METRICS
from leapalign.storage.folder_lock import OWNER

LATEST = Path("latest")
_TOUCHED = ("config.yaml", METRICS, OWNER)
"""What a run writes as it goes, and nothing else does."""


def run_and_step(path: Path, step: int | None = None) -> tuple[Path, int | None]:
    """The run and the step that ``path`` names: ``RUN``, or ``RUN/checkpoints/step-N``, or ``RUN`` and ``step``.

    Raises UserError where the two name different steps.
    """
    found = re.fullmatch(r"step-(\d+)", path.name)
    if found is None or path.parent.name != "checkpoints":
        return path, step
    named = int(found[1])
    if step not in (None, named):
        raise UserError(f"'{path}' is step {named}, and --step says {step}; leave one of them out")
    return path.parents[1], named


def newest_run(folder: Path) -> Path:
    """The run in ``folder``, or in folders of it, that was active last. Raises UserError where there is none."""
    runs = {config.parent: _last_active(config.parent) for config in folder.rglob("config.yaml")}
    if not runs:
        raise UserError(f"'{folder}' holds no run; name one, or begin one with --config")
    return max(runs, key=lambda run: (runs[run], run))


def _last_active(run: Path) -> int:
    return max(path.stat().st_mtime_ns for path in (run / name for name in _TOUCHED) if path.exists())
