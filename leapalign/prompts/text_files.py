"""Text files, opened and read line by line, with one line in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from leapalign.inputs.validation import UserError, brief

LONGEST_LINE = 2**16
"""Bytes: far more than text encoders read."""
PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""What files begin with that gzip, zip (spreadsheets too), xz or zstd made."""


def open_text(path: Path) -> BufferedReader:
    """The file, at its beginning. Raises UserError where it cannot be read or is compressed."""
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise UserError(f"cannot read prompt file {str(path)!r}: {brief(error)}; check prompts.path") from None
    if file.peek().startswith(PACKED):
        file.close()
        raise UserError(f"prompt file '{path}' is compressed, or a spreadsheet; unpack it, or save it as text or .csv")
    return file


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """All of `lines_of` a file."""
    with open_text(path) as file:
        yield from lines_of(file, path)


def lines_of(file: BufferedReader, path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number from 1 on, its end included. Raises UserError where one is too long or no UTF-8."""
    offset = 0
    for number in itertools.count(1):
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}:{number} is longer than {LONGEST_LINE:,} bytes; shorten it")
        yield number, decoded(line, path, offset)
        offset += len(line)


def decoded(content: bytes, path: Path, offset: int = 0) -> str:
    """What stands at byte ``offset`` of the file. Raises UserError where it is no UTF-8."""
    try:
        # A file from Windows may begin with a byte order mark.
        return content.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file '{path}' is not UTF-8 at byte {offset + error.start}; re-encode it") from None
