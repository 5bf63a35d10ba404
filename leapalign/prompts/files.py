"""Prompt files: read line by line or row by row, and checked."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from leapalign.inputs.validation import UserError, brief
from leapalign.prompts.tables import dataset_prompts, parquet_prompts

JSON_LINES = (".jsonl", ".json")
MOST_PROMPTS = 1_000_000
"""In one file; a list of them takes about 100 MB and an epoch's order 8 MB."""
LONGEST_LINE = 2**16
"""Bytes in a line of a file, or characters in a prompt: far more than text encoders read."""


def read_prompts(path: Path) -> list[str]:
    """All of `iter_prompts`."""
    return list(iter_prompts(path))


def iter_prompts(path: Path) -> Iterator[str]:
    """Prompts of a file, one after the other, duplicates included; only a little of the file is in memory.

    ``.jsonl`` and ``.json``: an object with the key ``prompt`` a line, as GenEval has it. ``.parquet``, a folder of
    such files, or one that `datasets` saved to disk: the column ``prompt``. Anything else: a prompt a line. Blank lines
    are skipped. Raises UserError for a file that is missing, unreadable, empty or of more than `MOST_PROMPTS`, and for
    a prompt that is no text, naming its place.
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
    if suffix in JSON_LINES:
        return ((where, _prompt_of(line, where)) for where, line in _lines(path))
    return _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its place."""
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise UserError(f"cannot read prompt file {str(path)!r}: {brief(error)}; check prompts.path") from None
    offset = 0
    with file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}:{number} is longer than {LONGEST_LINE:,} bytes; shorten it")
            try:
                # A file from Windows may begin with a byte order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                where = offset + error.start
                raise UserError(f"prompt file '{path}' is not UTF-8 at byte {where}; re-encode it") from None
            offset += len(line)
            if text:
                yield f"{path}:{number}", text


def _prompt_of(line: str, where: str) -> object:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also for numbers and nesting that Python refuses
        reason = error.msg if isinstance(error, json.JSONDecodeError) else brief(error)
        raise UserError(f"{where} is not valid JSON: {reason}; correct it") from None
    return record.get("prompt") if isinstance(record, dict) else None


def _checked(prompt: object, where: str) -> str:
    text = prompt.strip() if isinstance(prompt, str) else ""
    if not text:
        raise UserError(f'{where} has no "prompt" text; each line or row needs one, as {{"prompt": "..."}}')
    if "\0" in text:
        raise UserError(f"{where} holds a NUL character, as no text does; check that the file is the right one")
    if len(text) > LONGEST_LINE:
        raise UserError(f"{where} is longer than {LONGEST_LINE:,} characters; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        raise UserError(f"{where} holds half of a surrogate pair, which is no character; correct it") from None
    return text
