"""Paths as people write them: ``~`` is the home folder, in a config as on the command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expanded(path: str) -> str:
    """``path``, with the home folder for a ``~`` or ``~name`` that it begins with. Raises ValueError without one."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        name = Path(path).parts[0]
        raise ValueError(f"there is no home folder {name}; write the path out, or ./{name} for a folder called so")
    return found


PathText = Annotated[str, AfterValidator(expanded)]
"""A path, or what else may stand in its place, such as a hub id: every such key of a dataclass is one."""


def path_argument(text: str) -> Path:
    """The type of every path on the command line."""
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
