"""Configurations as YAML files, and keys overridden as ``section.key=value``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from leapalign.config.names import known_as
from leapalign.config.profiles import RECIPES, config_file
from leapalign.config.sections import Config
from leapalign.inputs.validation import UserError, brief, shortened, validated
from leapalign.inputs.yaml_values import LONGEST, yaml_values
from leapalign.storage.durable import write_text

SECTIONS = {field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default_factory)}
"""Keys with keys of their own, always the same ones."""


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at ``path``, or of the profile called so. Raises UserError where there is none."""
    path = config_file(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise UserError(f"cannot read config '{path}': {error.strerror}; check --config") from None
    except ValueError as error:  # no UTF-8, or a path with a NUL character
        raise UserError(f"cannot read config '{path}': {brief(error)}; check --config") from None
    values = yaml_values(text, f"config '{path}'")
    if not isinstance(values, dict):
        raise UserError(f"config '{path}' must be a mapping of keys to values, see leapalign configs tiny")
    return values


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """``values`` with ``section.key=value`` assignments applied; values are read as YAML."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted:
            raise UserError(f"override '{shortened(assignment)}' must read section.key=value")
        *sections, key = dotted.split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"override '{shortened(assignment)}': '{section}' is a value, not a section")
        target[key] = yaml_values(text, f"override '{shortened(assignment)}'")
    return result


def load_config(path: Path | Sequence[Path], assignments: Sequence[str] = ()) -> Config:
    """The validated config in ``path``, or the profile called so, with overrides applied; of several, each laid over
    those before. Raises UserError, also for a recipe that lies over nothing: it names no model."""
    paths = [path] if isinstance(path, Path) else path
    if RECIPES in config_file(paths[0]).parents:
        raise UserError(
            f"'{paths[0]}' is a recipe, and names no model; give a card's profile of its model first, as in --config "
            f"flux1_dev/80gb --config {paths[0]}"
        )
    values = reduce(_laid_over, map(read_config, paths))
    return config_from(override(values, assignments), " with ".join(map(str, paths)))


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` with the keys of ``above``. A method or a reward comes whole: options of another would not fit it."""
    merged = {
        key: {**below[key], **above[key]}
        for key in SECTIONS & below.keys() & above.keys()
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return {**below, **above, **merged}


def config_from(values: Mapping[str, Any], where: str) -> Config:
    """The validated config of ``values``; ``where`` names their place.

    Raises UserError as `validated`; for a key that is elsewhere, or has another name here, it says which.
    """
    return validated(Config, values, where, known_as)


def save_config(config: Config, path: Path) -> None:
    """Writes every resolved key as YAML."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
