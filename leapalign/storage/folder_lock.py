"""One process works in a folder: ``run.lock`` in it is locked by the operating system as long as one does."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from leapalign.inputs.validation import UserError
from leapalign.storage.durable import writing

LOCK = "run.lock"
OWNER = "run.pid"
"""Beside the lock, which some systems let nobody else read. Who ends by himself takes it away."""
_log = logging.getLogger("leapalign")


@contextlib.contextmanager
def run_lock(run: Path, work: str = "trained") -> Iterator[None]:
    """Holds the lock of the folder ``run``; the lock of a dead process is free, and a warning tells of its death.

    work: what is done to it meanwhile. Raises UserError naming the process that holds it.
    """
    lock = FileLock(run / LOCK)
    with writing(run / LOCK):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"'{run}' is being {work} by process {_owner(run)}; wait for it, or stop it with Ctrl-C or kill"
            ) from None
    if (run / OWNER).exists():
        _log.warning(
            "process %s, by which '%s' was %s last, was killed from outside, as the system does where memory runs out; "
            "`leapalign memory` says how much a configuration needs",
            *(_owner(run), run, work),
        )
    try:
        with writing(run / OWNER):
            (run / OWNER).write_text(f"{os.getpid()}\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            (run / OWNER).unlink()
        lock.release()


def _owner(run: Path) -> str:
    with contextlib.suppress(OSError):
        return (run / OWNER).read_text().strip()
    return "unknown"
