"""Going on from an earlier checkpoint: what came after it is moved to ``set-aside-1/`` of the run, and kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from leapalign.runs.checkpoint import checkpoints_of
from leapalign.runs.history import FILE as HISTORY
from leapalign.runs.run_folder import INCIDENTS, METRICS, later_samples
from leapalign.storage.durable import beside, make_folder, rename, sync, writing
from leapalign.watch.records import FILE as WATCH


def set_aside(run: Path, iteration: int) -> Path:
    """Moves checkpoints and samples of later iterations than ``iteration`` to a new folder, and copies all records.

    Returns the folder. Killed on the way, nothing is lost: records are copied first, then checkpoints go, the newest
    first. Raises UserError where the folder cannot be written.
    """
    number = 1
    while (folder := run / f"set-aside-{number}").exists():
        number += 1
    with writing(folder):
        make_folder(folder)
        for name in (METRICS, INCIDENTS, WATCH, HISTORY):
            if (run / name).exists():
                with beside(folder / name) as partial:
                    shutil.copy(run / name, partial)
        later = [path for number, path in sorted(checkpoints_of(run).items(), reverse=True) if number > iteration]
        _move(later, folder / "checkpoints")
        _move(later_samples(run, iteration), folder / "samples")
    return folder


def _move(paths: list[Path], folder: Path) -> None:
    if paths:
        make_folder(folder)
    for path in paths:
        rename(path, folder / path.name)
        sync(path.parent)
