"""Prompts from ``.csv`` and ``.tsv``: a header, and a row of cells each."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from leapalign.inputs.validation import UserError, brief
from leapalign.prompts.columns import prompt_column
from leapalign.prompts.text_files import text_lines

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def delimited_prompts(path: Path) -> Iterator[tuple[str, object]]:
    """The column of prompts, each row with its place. Raises UserError where there is none, or cells are not clear."""
    rows = _rows(path, DELIMITERS[path.suffix.lower()])
    for _, names in rows:
        column = prompt_column(names, f"'{path}'")
        for where, cells in rows:
            if len(cells) > len(names):
                # Else a prompt with a comma would end there.
                raise UserError(
                    f"{where} has {len(cells)} cells under {len(names)} names; put quotes around a cell that holds "
                    "what parts them"
                )
            yield where, cells[column] if column < len(cells) else None


def _rows(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The cells of each row that is not blank, with the place where it begins."""
    number, line = 0, ""

    def lines() -> Iterator[str]:
        nonlocal number, line
        for number, line in text_lines(path):  # noqa: B007 -- read below
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        first = number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # With tabs many write quotes as they are, so that a cell may begin with one: PartiPrompts has such a row.
            if delimiter != "\t" or number > first:
                raise UserError(
                    f"{path}:{first} is no row of cells ({brief(error)}); double the quotes within a cell, and put "
                    "quotes around it"
                ) from None
            cells = line.rstrip("\r\n").split(delimiter)
        if any(map(str.strip, cells)):
            yield f"{path}:{first}", cells
