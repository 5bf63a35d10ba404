"""Where files that travel with the package lie: ``embedded:NAME`` in a config names one of them."""

from __future__ import annotations

from pathlib import Path

PREFIX = "embedded:"
FOLDER = Path(__file__).parents[1] / "tiny" / "weights"


def resolve(path: str) -> str:
    """``embedded:NAME`` as a path on this machine; anything else unchanged."""
    return str(FOLDER / path.removeprefix(PREFIX)) if path.startswith(PREFIX) else path
