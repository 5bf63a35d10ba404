"""The command line of a run on several processes: started here, or by torchrun."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

from leapalign.inputs.validation import UserError


def launched(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Trains as ``arguments`` say in ``arguments.processes`` processes of this machine.

    Raises UserError for a number that is none, and where one is killed; SystemExit where one fails, which says why.
    """
    from leapalign.parallel.launching import launch

    if arguments.processes < 1:
        raise UserError("--processes must be at least 1")
    if "WORLD_SIZE" in os.environ:
        raise UserError("torchrun has started the processes already; leave out --processes")
    config = [word for path in arguments.config or () for word in ("--config", str(path))]
    resume = ["--resume", str(arguments.resume)] if arguments.resume else []
    code = launch(arguments.processes, ["train", *config, *resume, *["--json"] * arguments.json, *overrides])
    if code:
        raise SystemExit(code)


@contextlib.contextmanager
def among_processes() -> Iterator[None]:
    """Within the block this is one of the processes that torchrun started, if it did; the first one alone speaks."""
    from leapalign.parallel.processes import first, joined

    with joined(), contextlib.ExitStack() as silence:
        if not first():
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        yield
