"""The command line of leap_kernels: `python -m leap_kernels list | explain | bench | audit | export`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import audit, bench, export, listing
from .report import ToolError

CLOSED_PIPE = 141
"""The exit code that a shell gives a process that SIGPIPE ended."""


def main(argv: Sequence[str] | None = None, program: str = "leap_kernels") -> int:
    """Run the command in `argv` (default: the process's arguments) and return the exit code: 2 for bad input.

    `program` is how usage and error messages call it.
    """
    try:
        try:
            return _run(argv, program)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has enough of it. What the interpreter flushes at its end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _run(argv: Sequence[str] | None, program: str) -> int:
    parser = argparse.ArgumentParser(prog=program, description="Kernels for flow-matching trainers: tools.")
    commands = parser.add_subparsers(dest="command", required=True)
    for tool in (listing, bench, audit, export):
        tool.add_commands(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.execute(arguments))
    except ToolError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
