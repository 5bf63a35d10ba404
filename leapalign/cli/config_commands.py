"""``leapalign configs`` and ``leapalign config``: the configs that come with the package, and every key of one."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from leapalign.inputs.validation import UserError


def configs_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.config.profiles import copy_of, profile, profiles, purpose

    if arguments.name is None:
        if arguments.copy:
            raise UserError("name the config to copy, as in leapalign configs tiny --copy mine.yaml")
        found = profiles()
        width = max(map(len, found))
        for name, file in found.items():
            print(f"{name.ljust(width)}  {purpose(file)}")
        return
    text = copy_of(profile(arguments.name))
    if arguments.copy is None:
        print(text, end="")
        return
    _write_new(arguments.copy, text)
    print(f"{arguments.copy}; use it with --config {arguments.copy}")


def _write_new(file: Path, text: str) -> None:
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise UserError(f"'{file}' is there already; name another file") from None


def config_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.config.schema import config_schema, groups
    from leapalign.methods import METHODS
    from leapalign.rewards import REWARDS, Share

    schema = config_schema(METHODS, REWARDS, Share)
    if arguments.json:
        print(json.dumps(schema, indent=2))
        return
    for heading, keys in groups(schema):
        print(textwrap.fill(_plain(heading), 120), end="\n\n")
        for key in keys:
            default = "has to be given" if key.default is None else f"default {key.default}"
            print(f"  {key.name}: {key.kind}; {default}")
            if key.sentence:
                indent = "      "
                print(textwrap.fill(_plain(key.sentence), 120, initial_indent=indent, subsequent_indent=indent))
        print()


def _plain(text: str) -> str:
    return text.replace("``", "`")
