"""The command line called from a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leapalign.cli import main

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr of a command that ends with 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line
