"""Prompts from JSON: a value a line, or one array of them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leapalign.inputs.validation import UserError, brief
from leapalign.prompts.columns import prompt_column
from leapalign.prompts.text_files import decoded, lines_of, open_text

SUFFIXES = (".jsonl", ".json")
LONGEST_ARRAY = 2**28
"""Bytes of a file that is one array: it is in memory as a whole."""


def json_prompts(path: Path) -> Iterator[tuple[str, object]]:
    """Texts, or the prompts of objects, each with its place. Raises UserError where an object does not name one."""
    for where, value in json_values(path):
        if isinstance(value, dict):
            yield where, value[list(value)[prompt_column(list(value), where)]]
        else:
            yield where, value if isinstance(value, str) else None


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of an array, or of lines that are not blank, each with its place. Raises UserError for other files."""
    with open_text(path) as file:
        if file.peek().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            content = file.read(LONGEST_ARRAY + 1)
            if len(content) > LONGEST_ARRAY:
                raise UserError(f"'{path}' is an array of more than {LONGEST_ARRAY:,} bytes; write one value a line")
            for number, value in enumerate(_parsed(decoded(content, path), f"'{path}'"), start=1):
                yield f"{path}, value {number},", value
            return
        for number, line in lines_of(file, path):
            if line.strip():
                yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f" in line {error.lineno}" if "\n" in text.strip() else ""
        reason = f"{error.msg}{place}"
    except (ValueError, RecursionError) as error:  # numbers and nesting that Python refuses
        reason = brief(error)
    raise UserError(f"{where} is not valid JSON: {reason}; write one array, or one value a line")
