"""Cuts the PTX of a compiled Triton kernel into instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"(?:@(?P<negated>!?)(?P<guard>%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)(?:\s+(?P<operands>.*))?", re.S
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_LABEL = re.compile(r"([$\w]+):\s*")


class Uncountable(ValueError):
    """The PTX does something whose memory traffic cannot be read off it."""


@dataclass(frozen=True)
class Instruction:
    """An instruction: `@!%p1 ld.global.b32 {%r1}, [%rd2]` has the guard `%p1`, negated, and two operands."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    negated: bool = False


def parse(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of the one kernel in `ptx`, and the position that each label stands for.

    Raises:
        Uncountable: if there is no kernel.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _kernel_body(ptx).split(";"):
        # Inline assembly may open and close a scope between two instructions.
        text = statement.strip(" \t\n{}") if "," not in statement else statement.lstrip(" \t\n{}").rstrip()
        while label := _LABEL.match(text):
            labels[label[1]] = len(instructions)
            text = text[label.end() :].lstrip(" \t\n{}")
        found = _INSTRUCTION.fullmatch(text)
        if found:
            operands = tuple(_OPERAND.findall(found["operands"] or ""))
            instructions.append(Instruction(found["opcode"], operands, found["guard"], bool(found["negated"])))
    return instructions, labels


def _kernel_body(ptx: str) -> str:
    """Cut out what stands between the braces of the kernel, without comments and source positions."""
    plain = re.sub(r"//[^\n]*|^\s*\.(?:loc|pragma)\b[^\n]*", "", ptx, flags=re.M)
    entry = plain.find(".entry")
    start = plain.find("{", plain.find(")", entry))
    depth = 0
    for brace in re.finditer(r"[{}]", plain[start:] if 0 <= entry < start else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return plain[start + 1 : start + brace.start()]
    raise Uncountable("the PTX holds no kernel")
