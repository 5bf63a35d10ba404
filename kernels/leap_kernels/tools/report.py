"""What the commands share: errors in one sentence, tables as text, and where figures come from."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .._triton import triton


class ToolError(Exception):
    """Bad input or a missing part of the machine, in one sentence that names the remedy."""


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out rows under a header; columns whose every cell starts with a digit stand to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(*([list(header), *cells]), strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        placed = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(placed).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, cells)])


def provenance() -> dict[str, str | None]:
    """Return the git revision of the sources (None outside a clone) and the versions that figures depend on."""
    return {
        "revision": _revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
    }


@functools.cache
def _revision() -> str | None:
    here = Path(__file__)
    # An installed copy may lie in a folder that belongs to some other repository.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty")


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
