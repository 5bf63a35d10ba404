"""``~`` is the home folder in every path: of a config, of a reward, and on the command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from leapalign.cli.main import build_parser, main
from leapalign.config import Config, load_config
from leapalign.config.profiles import profiles
from leapalign.inputs.paths import path_argument
from leapalign.inputs.validation import UserError, validated
from leapalign.methods import METHODS
from leapalign.rewards import REWARDS

NO_PATHS = {("ModelConfig", "negative_prompt")}
WORDS = {"--prompt", "--gpu-memory"}
"""Options with a text that is no path."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def sections(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default_factory):
            yield from sections(field.default_factory)


TEXTS = [
    (cls, name)
    for cls in (*sections(Config), *METHODS.values(), *REWARDS.values())
    for name, hint in get_type_hints(cls).items()
    if hint in (str, str | None) and (cls.__name__, name) not in NO_PATHS
]


@pytest.mark.parametrize(("cls", "name"), TEXTS, ids=lambda value: getattr(value, "__name__", value))
def test_every_text_in_a_config_is_a_path(cls: type[Any], name: str, home: Path) -> None:
    """One that is none goes into `NO_PATHS`."""
    needed = {field.name: "x" for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    needed = {key: value for key, value in needed.items() if key in get_type_hints(cls) and cls in REWARDS.values()}
    found = getattr(validated(cls, {**needed, name: "~/some/x"}, "test"), name)
    assert found == str(home / "some/x")
    assert getattr(validated(cls, {**needed, name: "owner/model"}, "test"), name) == "owner/model"


def test_the_walk_meets_the_paths_there_are() -> None:
    met = {f"{cls.__name__}.{name}" for cls, name in TEXTS}
    assert met >= {"Config.output", "ModelConfig.path", "PromptsConfig.cache", "WatchConfig.prompts", "Custom.function"}


def options() -> Iterator[tuple[str, argparse.Action]]:
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command, parser in commands.choices.items():
        for action in parser._actions:
            yield command, action


def test_every_option_with_a_text_is_a_path() -> None:
    """One that is none goes into `WORDS`."""
    for command, action in options():
        if action.nargs != 0 and not action.choices and not WORDS & set(action.option_strings):
            assert action.type in (path_argument, int), f"{command} {action.dest}"


def test_a_config_in_the_home_folder_with_a_run_in_it(home: Path) -> None:
    assert main(["configs", "tiny", "--copy=~/mine.yaml"]) == 0
    config = load_config(home / "mine.yaml", ["output=~/runs/x", "prompts.path=~/prompts.txt", "watch.prompts=~/held"])
    assert config.output == str(home / "runs/x")
    assert config.prompts.path == str(home / "prompts.txt")
    assert config.watch.prompts == str(home / "held")


def test_a_home_folder_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    with pytest.raises(UserError, match=r"'output' is '~nobody-here/x': there is no home folder ~nobody-here; write"):
        load_config(profiles()["tiny"], ["output=~nobody-here/x"])
    with pytest.raises(SystemExit) as stop:
        main(["configs", "tiny", "--copy", "~nobody-here/x.yaml"])
    assert stop.value.code == 2
    assert "there is no home folder ~nobody-here" in capsys.readouterr().err
    assert not list(home.iterdir())


def test_a_folder_called_so_can_be_named() -> None:
    assert load_config(profiles()["tiny"], ["output=./~nobody-here"]).output == "./~nobody-here"
