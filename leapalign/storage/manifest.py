"""The manifest of a folder, ``manifest.json``: size and SHA-256 of its files, by which damage is told."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "manifest.json"
_CHUNK = 1 << 22


def write_manifest(folder: Path) -> None:
    """Describes all files in ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sha256, files))
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    (folder / FILE).write_text(json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path, within: str = "") -> str | None:
    """The first file that is not as its manifest has it, and how; None where all are.

    within: only files whose name, from ``folder`` on, begins so are looked at.
    """
    try:
        entries = json.loads((folder / FILE).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"it has no {FILE}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{FILE} cannot be read"
    chosen = {name: entry for name, entry in expected.items() if name.startswith(within)}
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _difference(folder / name, *chosen[name]), chosen)
        return next(
            (f"{name} {difference}" for name, difference in zip(chosen, found, strict=True) if difference), None
        )


def _difference(path: Path, size: int, digest: str) -> str | None:
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"has {actual} of {size} bytes"
        return None if _sha256(path) == digest else "was altered"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
