"""Begins a run in a folder of its own, or continues the one that is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from leapalign.config import Config
from leapalign.inputs.validation import UserError
from leapalign.runs.run import Run
from leapalign.runs.run_folder import METRICS
from leapalign.storage.durable import make_folder, writing
from leapalign.storage.folder_lock import run_lock


def refuse_used_folder(run: Path) -> None:
    """Raises UserError where ``run`` already holds a run, or can be no folder."""
    with writing(run):
        used = (run / METRICS).exists() or (run / "checkpoints").exists()
    if used:
        raise UserError(f"'{run}' already holds a run; continue it with --resume {run} or choose another output")


def unused_folder(run: Path) -> Path:
    """``run``, or the first of ``run-2``, ``run-3``, ... that holds nothing yet."""
    candidate, number = run, 2
    while candidate.exists():
        candidate, number = run.with_name(f"{run.name}-{number}"), number + 1
    return candidate


@contextlib.contextmanager
def opened_run(config: Config, resume: bool) -> Iterator[Run]:
    """The run in ``config.output``, at its latest checkpoint if ``resume``; no other process can have it, too.

    Raises UserError for a bad config, before anything is written, and for a folder that is used or in use.
    """
    folder = Path(config.output)
    with contextlib.ExitStack() as held:
        if resume:
            # At once: a second model in memory could end the first process.
            held.enter_context(run_lock(folder))
            run = Run.from_config(config)
            run.resume()
        else:
            refuse_used_folder(folder)
            run = Run.from_config(config)
            with writing(folder):
                make_folder(folder)
            held.enter_context(run_lock(folder))
            refuse_used_folder(folder)
        yield run
