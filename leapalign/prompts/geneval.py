"""GenEval's prompt files, and the folders in which its evaluation looks for images (arXiv 2310.11513)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from leapalign.prompts.json_files import SUFFIXES, json_values

KEYS = ("tag", "include")
"""What tells GenEval's lines from other JSON lines with a prompt."""


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """What GenEval judges each prompt by, in the order of the prompts; empty where the file is not one of GenEval's.

    path: a prompt file that `leapalign.prompts.files.read_prompts` has read.
    """
    records: list[dict[str, Any]] = []
    if path.suffix.lower() not in SUFFIXES:
        return records
    for _, record in json_values(path):
        if not isinstance(record, dict) or any(key not in record for key in KEYS):
            return []
        records.append(record)
    return records


def prepare_folders(output: Path, metadata: list[dict[str, Any]]) -> list[Path]:
    """Makes ``<index>/metadata.jsonl`` and ``<index>/samples/`` for each prompt; returns where its image belongs."""
    images = []
    for index, record in enumerate(metadata):
        folder = output / f"{index:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        images.append(folder / "samples" / "00000.png")
    return images
