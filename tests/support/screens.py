"""A terminal as a test sees it."""

from __future__ import annotations

import io

import pytest


class Terminal(io.StringIO):
    """What was written, and what of it stands on the screen."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """The lines on the screen, bars without what follows their percentage."""
        return [line.partition("|")[0].rstrip() for line in self.screen()]

    def screen(self) -> list[str]:
        """The lines on the screen."""
        shown, row, column = [""], 0, 0
        text = self.getvalue()
        while text:
            if text.startswith("\x1b[A"):
                row, text = max(row - 1, 0), text[3:]
                continue
            character, text = text[0], text[1:]
            if character == "\r":
                column = 0
            elif character == "\n":
                row, column = row + 1, 0
                if row == len(shown):
                    shown.append("")
            else:
                line = shown[row].ljust(column)
                shown[row] = line[:column] + character + line[column + 1 :]
                column += 1
        return [line.rstrip() for line in shown if line.strip()]

    def descriptions(self) -> set[str]:
        """What stood before a bar's percentage, at any time."""
        pieces = self.getvalue().replace("\n", "\r").split("\r")
        return {piece.partition(":")[0].strip() for piece in pieces if "%|" in piece}


def stderr_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Takes the place of stderr; to be called in the test itself, as pytest takes stderr back before it."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    return screen
