"""Begins a run in a folder of its own, or continues the one that is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from leapalign.config import Config
from leapalign.config.resuming import refuse_changes
from leapalign.inputs.validation import UserError
from leapalign.parallel.processes import count, first
from leapalign.parallel.refusals import refuse_unsupported
from leapalign.prompts.files import read_prompts
from leapalign.runs.checkpoint import iteration_of, latest_checkpoint, named_checkpoint
from leapalign.runs.history import recorded, trained_with
from leapalign.runs.run import Run
from leapalign.runs.run_folder import METRICS
from leapalign.storage.durable import make_folder, writing
from leapalign.storage.embedded import resolve
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
def opened_run(config: Config, resume: bool, step: int | None = None) -> Iterator[Run]:
    """The run in ``config.output``; no other process can have it, too.

    resume: it goes on after its latest checkpoint, or that of ``step``; from the start where there is none. Raises
    UserError for a bad config, a change that a resumed run cannot make, and a folder that is used or in use, before
    anything is written.
    """
    folder = Path(config.output)
    refuse_unsupported(config, count())
    with contextlib.ExitStack() as held:
        if resume:
            if not folder.is_dir():
                raise UserError(
                    f"there is no run '{folder}' to go on with; check --resume, or leave it out to begin one"
                )
            # At once: a second model in memory could end the first process.
            _lock(folder, held)
            checkpoint = latest_checkpoint(folder) if step is None else named_checkpoint(folder, step)
            if checkpoint is not None:
                _refuse_changes(config, iteration_of(checkpoint))
            run = Run.from_config(config, checkpoint)
        else:
            refuse_used_folder(folder)
            run = Run.from_config(config)
            _lock(folder, held)
            refuse_used_folder(folder)
        yield run


def _lock(folder: Path, held: contextlib.ExitStack) -> None:
    """Makes ``folder``, and holds its lock as long as ``held``, for all processes of the run."""
    if first():
        with writing(folder):
            make_folder(folder)
        held.enter_context(run_lock(folder))


def _refuse_changes(config: Config, iteration: int) -> None:
    """Raises UserError where the run cannot go on after ``iteration`` with the settings in ``config``."""
    run = Path(config.output)
    if config.train.iterations < iteration:
        raise UserError(
            f"'{run}' has done {iteration} iterations, and train.iterations is {config.train.iterations}; set it to "
            f"more, or go on from an earlier checkpoint with --resume {run}/checkpoints/step-N"
        )
    prompts = read_prompts(Path(resolve(config.prompts.path)))
    refuse_changes(trained_with(run, iteration), recorded(config, prompts))
