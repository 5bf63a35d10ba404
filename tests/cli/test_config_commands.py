"""``leapalign config`` and what belongs to every command: the version, and an output that nobody reads to its end."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

import pytest

from leapalign.cli import main
from leapalign.config.profiles import SCHEMA


def test_config_lists_every_key_with_type_default_and_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("  train.iterations: integer from 1; default 300")
    assert lines[place + 1] == "      Optimizer steps of the run."
    assert "  method.alpha: number from 0; default 0.3" in lines
    assert "  reward.function: text; has to be given" in lines
    assert max(map(len, lines)) <= 120


def test_config_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(SCHEMA.read_text())


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "cache", "memory"])
def test_help_points_at_the_list_of_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "leapalign config" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["config"], ["configs", "tiny"], ["doctor"]])
def test_what_has_no_config_takes_no_keys(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "train.iterations=3"])
    assert stop.value.code == 2
    assert f"leapalign {command[0]} takes no config keys" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"leapalign {importlib.metadata.version('leapalign')}\n"


@pytest.mark.parametrize("package", ["leapalign", "leap_kernels"])
def test_type_checkers_may_read_our_types(package: str) -> None:
    assert (importlib.resources.files(package) / "py.typed").is_file()


@pytest.fixture
def closed() -> Iterator[IO[str]]:
    """The end of a pipe that nobody reads; a line is written as soon as it is there."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stream:
        yield stream


@pytest.mark.parametrize("arguments", [["configs"], ["config"], ["--help"], ["kernels", "list"], ["kernels", "--help"]])
def test_a_closed_pipe_ends_a_command_quietly(
    arguments: list[str], closed: IO[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", closed)
    assert main(arguments) == 141
    assert capsys.readouterr().err == ""


def test_nothing_is_said_at_the_end_of_the_process(closed: IO[str]) -> None:
    command, buffered = [sys.executable, "-m", "leapalign.cli", "--help"], {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, env=buffered, check=False)
    assert (done.returncode, done.stderr) == (141, b"")
