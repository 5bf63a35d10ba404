"""Runs command lines one after the other in one process, which imports PyTorch once.

    python tests/support/run_commands.py COMMANDS OUTCOMES

COMMANDS: a JSON list of command lines, each a list of words, with variables in front and a ``> FILE`` behind. A line of
OUTCOMES for each: null, or what went wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path


def call(program: str, arguments: list[str]) -> int | str | None:
    """What the program would end with."""
    if program == "leapalign":
        from leapalign.cli import main

        return main(arguments)
    assert program in ("python", "python3")
    option, name, *rest = arguments if arguments[0].startswith("-") else ("", *arguments)
    try:
        if option == "-c":
            exec(compile(name, "-c", "exec"), {"__name__": "__main__"})
            return 0
        sys.argv[:] = [name, *rest]
        runpy.run_module(name, run_name="__main__") if option == "-m" else runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def outcome(words: list[str]) -> str | None:
    """None, or what went wrong."""
    words = list(words)
    before, path = dict(os.environ), list(sys.path)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
        sys.path[:0] = [str(Path(value).resolve())] if name == "PYTHONPATH" else []
        importlib.invalidate_caches()
    file = words[words.index(">") + 1] if ">" in words else None
    if file:
        words = words[: words.index(">")]
    errors = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stderr(errors))
            out = stack.enter_context(Path(file or os.devnull).open("w"))
            if words[0] == "printf":
                code = subprocess.run(words, stdout=out, check=False).returncode
            else:
                stack.enter_context(contextlib.redirect_stdout(out))
                code = call(words[0], words[1:])
    except BaseException:
        return traceback.format_exc()
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.path[:] = path
    return None if not code else f"ended with {code}: {errors.getvalue()}"


if __name__ == "__main__":
    commands, outcomes = (Path(name) for name in sys.argv[1:])
    found = [outcome(words) for words in json.loads(commands.read_text())]
    outcomes.write_text(json.dumps(found))
