"""How a kernel narrows what it stores to bfloat16 or float16, read from its PTX.

From every value that is stored the way leads back, through whatever moves or packs bits, to what made the value: a
conversion from float32, which names its rounding, or something else, such as a float32 number whose bits were cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .ptx_parse import Instruction

NEAREST = "nearest even"
"""Rounded to the nearest number, ties to even, by one instruction."""
COPIED = "copied"
"""As it lay in another tensor of 16 bits an element."""
BITS = "bits"
"""Made by integer arithmetic, as stochastic rounding is."""
CUT = "cut"
"""Bits of a float32 number."""

_NARROWED = re.compile(r"cvt\.(?P<mode>rn|rz|rm|rp)(?:\.\w+)*\.(?:bf16|f16)(?:x2)?\.f32")
# Of two such numbers the compiler may round the product in one go.
_PRODUCT = re.compile(r"(?:mul|fma)(?:\.rn)?\.(?:bf16|f16)(?:x2)?")
_MODES = {"rn": NEAREST, "rz": "towards zero", "rm": "down", "rp": "up"}
_MOVED = re.compile(r"(?:mov|selp|prmt|shl|shr|shf|and|or|bfe|bfi|cvt)\b(?!.*\bf(?:16|32|64)\b)")
_REGISTER = re.compile(r"%[\w.]+")


def roundings(instructions: list[Instruction], stores: Iterable[int], copies: Iterable[int]) -> set[str]:
    """Return how the values that the instructions at `stores` write to memory were made.

    Those at `copies` load numbers of 16 bits.
    """
    made: dict[str, list[int]] = {}
    for at, instruction in enumerate(instructions):
        if instruction.operands and not instruction.opcode.startswith(("st", "bra", "bar")):
            for register in _REGISTER.findall(instruction.operands[0]):
                made.setdefault(register, []).append(at)
    pending = [register for at in stores for register in _REGISTER.findall(instructions[at].operands[-1])]
    seen, found, narrow = set(pending), set(), set(copies)
    while pending:
        for at in made.get(pending.pop(), []):
            instruction = instructions[at]
            origin = COPIED if at in narrow else _origin(instruction.opcode)
            if origin is not None:
                found.add(origin)
                continue
            # Through shared memory, threads exchange what each has stored there.
            shared = instruction.opcode.startswith("ld.shared")
            sources = set(_exchanged(instructions) if shared else _sources(instruction)) - seen
            seen |= sources
            pending.extend(sources)
    return found


def _origin(opcode: str) -> str | None:
    """Say what an instruction makes of a value, or return None if it moves bits that others made."""
    narrowed = _NARROWED.fullmatch(opcode)
    if narrowed:
        return _MODES[narrowed["mode"]]
    if _PRODUCT.fullmatch(opcode):
        return NEAREST
    if opcode.startswith("ld.shared") or _MOVED.match(opcode):
        return None
    return CUT if opcode.startswith("ld") or re.search(r"\.f(?:32|64)\b", opcode) else BITS


def _sources(instruction: Instruction) -> list[str]:
    """Return the registers whose bits an instruction moves."""
    sources = instruction.operands[1:]
    # The last one of a choice is the condition.
    chosen = sources[:2] if instruction.opcode.startswith("selp") else sources
    return [register for source in chosen for register in _REGISTER.findall(source)]


def _exchanged(instructions: list[Instruction]) -> Iterator[str]:
    for instruction in instructions:
        if instruction.opcode.startswith("st.shared"):
            yield from _REGISTER.findall(instruction.operands[-1])
