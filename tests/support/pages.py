"""The documents: their fenced blocks, their commands, and what they name. Every page of docs/ is one of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "kernels/README.md",
    "kernels/docs/trainers.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
PROGRAMS = ("leapalign", "make", "python", "printf", ".venv/bin/pre-commit", "hf", "pip", "python3", "tensorboard")
SHELLS = ("bash", "sh", "shell", "console")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_SPAN = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Command:
    """A command line as it stands on a page, line breaks and all."""

    page: str
    text: str

    def words(self) -> list[str]:
        """As a shell would split it: no comment, redirections and variables included."""
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars=">")
        lexer.whitespace_split = True
        return list(lexer)

    @property
    def program(self) -> str:
        """The first word that sets no variable."""
        return next((word for word in self.words() if "=" not in word), "")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """The contents of the page's fenced blocks in one of the languages, "" for those that name none."""
    return [content for language, content in _FENCE.findall(text_of(page)) if language in languages]


def spans(page: str) -> list[str]:
    """What stands between backticks, line breaks as spaces, outside fenced blocks."""
    return [" ".join(span.split()) for span in _SPAN.findall(_FENCE.sub("", text_of(page)))]


def commands(page: str) -> list[Command]:
    """Those in blocks, then those in the text that have arguments; blocks that begin otherwise show something else."""
    found = []
    for block in blocks(page, "", *SHELLS):
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        given = [Command(page, line) for line in lines]
        if block in blocks(page, *SHELLS) or given[0].program in PROGRAMS:
            found += given
    starts = tuple(f"{program} " for program in PROGRAMS)
    return found + [Command(page, span) for span in spans(page) if span.startswith(starts)]
