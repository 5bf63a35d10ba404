"""The configs that come with the package: ``tiny`` names ``configs/tiny.yaml``, from any folder."""

from __future__ import annotations

import os
from pathlib import Path

from leapalign.inputs.validation import UserError, did_you_mean, shortened

FOLDER = Path(__file__).parents[1] / "configs"
RECIPES = FOLDER / "recipes"
"""Published settings, to lay over the profile of a card."""
SCHEMA = Path(__file__).with_name("schema.json")
"""The JSON Schema of a config file, by which editors complete one."""


def profiles() -> dict[str, Path]:
    """The file of each, by name, such as ``flux1_dev/80gb``."""
    return {file.relative_to(FOLDER).with_suffix("").as_posix(): file for file in sorted(FOLDER.rglob("*.yaml"))}


def config_file(named: Path) -> Path:
    """The file that ``named`` means: itself, else the profile called so, also ``configs/NAME.yaml``.

    Raises UserError, naming the nearest, where there is neither.
    """
    if os.path.exists(named) and (not named.is_dir() or _name(named) not in profiles()):
        return named
    return profile(named)


def profile(named: Path) -> Path:
    """The file of the profile that ``named`` means. Raises UserError, naming the nearest, for none."""
    found = profiles()
    name = _name(named)
    if name not in found:
        raise UserError(
            f"cannot read config '{shortened(str(named))}': there is no such file, nor does a config of this name come "
            f"with leapalign{did_you_mean(name, found)}"
        )
    return found[name]


def purpose(file: Path) -> str:
    """The sentence in the first line of a profile."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def copy_of(file: Path) -> str:
    """The text of a profile, with a first line that tells editors where the schema of its keys lies."""
    return f"# yaml-language-server: $schema={SCHEMA.as_uri()}\n{file.read_text(encoding='utf-8')}"


def _name(named: Path) -> str:
    return named.as_posix().removeprefix("configs/").removesuffix(".yaml")
