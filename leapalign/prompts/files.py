"""Prompt files: read line by line or row by row, and checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from leapalign.inputs.validation import UserError
from leapalign.prompts import delimited, json_files
from leapalign.prompts.tables import dataset_prompts, parquet_prompts
from leapalign.prompts.text_files import text_lines

MOST_PROMPTS = 1_000_000
"""In one file; a list of them takes about 100 MB and an epoch's order 8 MB."""
LONGEST_PROMPT = 2**16
"""Characters: far more than text encoders read."""


def read_prompts(path: Path) -> list[str]:
    """All of `iter_prompts`."""
    return list(iter_prompts(path))


def iter_prompts(path: Path) -> Iterator[str]:
    """Prompts of a file, one after the other, duplicates included; only a little of the file is in memory.

    ``.jsonl`` and ``.json``: a text, or an object with the key ``prompt``, a line, as GenEval has them, or one array of
    such, as HPDv2 has it, which is read as a whole. ``.csv`` and ``.tsv``, whose first row is names; ``.parquet``, a
    folder of such files, or one that `datasets` saved to disk: the column ``prompt``. For other names see
    `leapalign.prompts.columns.prompt_column`. Anything else: a prompt a line. Blank lines are skipped. Raises UserError
    for a file that is missing, unreadable, empty or of more than `MOST_PROMPTS`, and for a prompt that is no text,
    naming its place.
    """
    number = 0
    for number, (where, prompt) in enumerate(_found(path), start=1):
        if number > MOST_PROMPTS:
            raise UserError(f"'{path}' holds more than {MOST_PROMPTS:,} prompts; split it")
        yield _checked(prompt, where)
    if not number:
        raise UserError(f"'{path}' holds no prompts; give it at least one")


def _found(path: Path) -> Iterator[tuple[str, object]]:
    """Each prompt with its place."""
    if os.path.isdir(path):  # False for a path that can be none
        return dataset_prompts(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_prompts(path)
    if suffix in json_files.SUFFIXES:
        return json_files.json_prompts(path)
    if suffix in delimited.DELIMITERS:
        return delimited.delimited_prompts(path)
    return ((f"{path}:{number}", line) for number, line in text_lines(path) if line.strip())


def _checked(prompt: object, where: str) -> str:
    text = prompt.strip() if isinstance(prompt, str) else ""
    if not text:
        raise UserError(f'{where} has no "prompt" text; give it one, or leave it out')
    if "\0" in text:
        raise UserError(f"{where} holds a NUL character, as no text does; check that the file is the right one")
    if len(text) > LONGEST_PROMPT:
        raise UserError(f"{where} is longer than {LONGEST_PROMPT:,} characters; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        raise UserError(f"{where} holds half of a surrogate pair, which is no character; correct it") from None
    return text
