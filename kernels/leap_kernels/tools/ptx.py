"""Counts the global memory that one program of a compiled Triton kernel moves, by walking through its PTX.

The walk executes what addresses, masks and branches are made of, for all threads of the program at once, and
leaves out the arithmetic on data. So a loop counts as often as it runs for the given arguments, a masked
access moves what its active threads touch, and a kernel whose addresses depend on data is refused, not guessed,
unless the data are given.

Per tensor, the bytes moved are those asked for (what several threads ask for in one instruction counts once; what
the program reads twice counts twice) or, if more, the 32-byte sectors that hold them: memory moves whole sectors,
so scattered accesses cost more than they ask for. An access at one address for all threads, such as that of a
noise level or a partial sum, costs its bytes alone: the rest of its sector serves the neighbouring programs.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .ptx_integers import Lanes, Value, evaluate, truncate, width
from .ptx_parse import Instruction, Uncountable, parse

SECTOR = 32
# Every pointer argument gets a stretch of the address space of its own, so that an address tells the tensor.
_STRETCH = 1 << 40
_MOST_STEPS = 100_000

_ADDRESS = re.compile(r"\[\s*(?P<base>[%\w$]+)\s*(?:\+\s*(?P<offset>-?\w+))?\s*\]")
_IMMEDIATE = re.compile(r"-?(?:0x[0-9a-fA-F]+|\d+)U?")
_GLOBAL = re.compile(r"(?:ld|st|atom|red)\b.*\.global\b|cp\.async\.c[ag]\.shared\.global")
# Bulk copies, calls, computed branches, and accesses that name no memory: they may be to any.
_REFUSED = re.compile(
    r"cp\.async\.bulk|cp\.reduce|call\b|brx\b|(?:ld|st|atom|red)\b(?!.*\.(?:global|shared|param|local|const))"
)
_WITHOUT_RESULT = ("st", "red", "bar", "barrier", "cp", "fence", "membar")


@dataclass
class Access:
    """One global memory instruction, and what it moved in all its executions.

    `position` is that among the instructions; `argument` the kernel's parameter that it addresses, None as long as it
    moved nothing; `bits` are those of one thread; `requested` the bytes; `scalar` says whether the threads shared one
    address each time; `first` and `end` bound the bytes, counted from the parameter's address.
    """

    opcode: str
    bits: int
    position: int
    argument: int | None = None
    scalar: bool = True
    requested: int = 0
    first: int = _STRETCH
    end: int = 0
    sectors: set[int] = field(default_factory=set, repr=False)

    @property
    def stores(self) -> bool:
        """Say whether memory is written."""
        return not self.opcode.startswith(("ld", "cp"))


@dataclass(frozen=True)
class Traffic:
    """The memory instructions of one program, in the order of the PTX."""

    accesses: tuple[Access, ...]

    @property
    def bytes_moved(self) -> int:
        """The bytes that the program moves, both ways."""
        total = 0
        for tensor in {(access.argument, access.stores) for access in self.accesses}:
            of_tensor = [access for access in self.accesses if (access.argument, access.stores) == tensor]
            requested = sum(access.requested for access in of_tensor)
            total += max(requested, SECTOR * len(set().union(*(access.sectors for access in of_tensor))))
        return total

    @property
    def vector_bits(self) -> int | None:
        """The narrowest access among those whose address differs between threads; None if there is none."""
        return min((access.bits for access in self.accesses if not access.scalar), default=None)

    @property
    def atomics(self) -> int:
        """The number of atomic instructions, which execute in no fixed order."""
        return sum(access.opcode.startswith(("atom", "red")) for access in self.accesses)


Argument = int | bytes | None
"""A number, what is in the memory that a pointer points to, or None for a pointer to data."""


def address_of(number: int) -> int:
    """Return the address that the walk gives to parameter `number`; those beyond the parameters are free for tables."""
    return (number + 1) * _STRETCH


def count_traffic(ptx: str, arguments: Sequence[Argument], threads: int, program: int, programs: int) -> Traffic:
    """Walk through the one kernel in `ptx` as program `program` of a one-dimensional grid.

    Args:
        ptx: the text of a module with one kernel.
        arguments: the values of the kernel's parameters in order.
        threads: threads of a program.
        program: the program to walk through.
        programs: how many programs the grid has.

    Raises:
        Uncountable: if an address, the mask of a branch or the kind of access cannot be known.
    """
    instructions, labels = parse(ptx)
    walk = _Walk(arguments, threads, program, programs)
    position = steps = 0
    while position < len(instructions):
        steps += 1
        if steps > _MOST_STEPS:
            raise Uncountable(f"the kernel takes more than {_MOST_STEPS} steps with these arguments")
        position = walk.step(position, instructions[position], labels)
    return Traffic(tuple(walk.accesses[at] for at in sorted(walk.accesses)))


class _Walk:
    """The state of one program: its registers, and what its memory instructions have moved so far."""

    def __init__(self, arguments: Sequence[Argument], threads: int, program: int, programs: int) -> None:
        self.arguments = arguments
        self.threads = threads
        self.accesses: dict[int, Access] = {}
        special = {"ctaid.x": program, "nctaid.x": programs, "ntid.x": threads}
        for axis in "yz":
            special |= {f"ctaid.{axis}": 0, f"tid.{axis}": 0, f"nctaid.{axis}": 1, f"ntid.{axis}": 1}
        self.registers: dict[str, Value] = {f"%{name}": self._same(value) for name, value in special.items()}
        self.registers["%tid.x"] = np.arange(threads, dtype=np.uint64)

    def step(self, position: int, instruction: Instruction, labels: dict[str, int]) -> int:
        """Execute the instruction at `position` and return the position of the next."""
        opcode = instruction.opcode
        if opcode.startswith(("bra", "ret", "exit")):
            if not self._all_take(instruction):
                return position + 1
            return labels[instruction.operands[0]] if opcode.startswith("bra") else sys.maxsize
        if _REFUSED.match(opcode):
            raise Uncountable(f"{opcode} may move memory that this walk cannot count")
        active = self._active(instruction)
        if _GLOBAL.match(opcode):
            self._touch(position, instruction, active)
        if opcode.partition(".")[0] not in _WITHOUT_RESULT:
            self._assign(instruction, active)
        return position + 1

    def _active(self, instruction: Instruction) -> Value:
        """Return which threads execute the instruction, or None if that depends on data."""
        if instruction.guard is None:
            return np.ones(self.threads, dtype=np.bool_)
        guard = self.registers.get(instruction.guard)
        return None if guard is None else guard.astype(np.bool_) ^ instruction.negated

    def _all_take(self, instruction: Instruction) -> bool:
        """Say whether the program takes a branch, which must not part its threads."""
        taken = self._active(instruction)
        if taken is None:
            raise Uncountable(f"{instruction.opcode} under {instruction.guard} depends on data")
        if taken.any() != taken.all():
            raise Uncountable(f"{instruction.opcode} under {instruction.guard} parts the threads of a program")
        return bool(taken.all())

    def _touch(self, position: int, instruction: Instruction, active: Value) -> None:
        """Count what the active threads move; a thread whose mask depends on data counts as active."""
        places = [operand for operand in instruction.operands if operand.startswith("[")]
        # An asynchronous copy names its place in shared memory first, and its bytes after the places.
        copies = instruction.opcode.startswith("cp")
        addresses = self._address(places[copies])
        if addresses is None:
            raise Uncountable(f"the address of {instruction.opcode} depends on data")
        bits = 8 * int(instruction.operands[2], 0) if copies else _access_bits(instruction.opcode)
        access = self.accesses.setdefault(position, Access(instruction.opcode, bits, position))
        different = np.unique(addresses if active is None else addresses[active])
        if different.size == 0:
            return
        touched = np.unique(different[:, None] + np.arange(bits // 8, dtype=np.uint64))
        access.argument = int(different[0]) // _STRETCH - 1
        access.requested += touched.size
        start = (access.argument + 1) * _STRETCH
        access.first = min(access.first, int(touched[0]) - start)
        access.end = max(access.end, int(touched[-1]) + 1 - start)
        if different.size > 1:
            access.scalar = False
            access.sectors.update((touched // np.uint64(SECTOR)).tolist())

    def _address(self, place: str) -> Value:
        found = _ADDRESS.fullmatch(place)
        base = self._read(found["base"]) if found else None
        if found is None or base is None:
            return None
        return base + np.uint64(int(found["offset"] or "0", 0) % (1 << 64))

    def _assign(self, instruction: Instruction, active: Value) -> None:
        """Set the destination registers: to None where the value depends on data."""
        if not instruction.operands:
            return
        targets = re.findall(r"%[\w.]+", instruction.operands[0])
        value = self._result(instruction) if len(targets) == 1 or instruction.opcode.startswith("mov") else None
        for target, part in zip(targets, _parts(value, instruction.opcode, len(targets)), strict=True):
            self.registers[target] = _merge(self.registers.get(target), part, active)

    def _result(self, instruction: Instruction) -> Value:
        sources = instruction.operands[1:]
        if instruction.opcode.startswith("ld.param"):
            return self._parameter(sources[0])
        if instruction.opcode.startswith("mov") and sources[0].startswith("{"):
            return _joined([self._read(part.strip()) for part in sources[0].strip("{}").split(",")], instruction.opcode)
        if instruction.opcode.startswith("ld.global"):
            return self._contents(self._address(sources[0]), _access_bits(instruction.opcode) // 8)
        if any(source.startswith(("[", "{")) for source in sources):
            return None
        return evaluate(instruction.opcode, [self._read(source) for source in sources])

    def _parameter(self, operand: str) -> Value:
        """Return an argument; pointers get addresses, and what Triton appends to the signature none."""
        index = int(operand.strip("[]").rpartition("_")[2])
        if index >= len(self.arguments):
            return None
        value = self.arguments[index]
        return self._same(value if isinstance(value, int) else address_of(index))

    def _contents(self, addresses: Value, size: int) -> Value:
        """Return what all threads load from one address, if it is in memory whose contents are given."""
        if addresses is None or np.unique(addresses).size > 1:
            return None
        number, place = divmod(int(addresses[0]) - address_of(0), _STRETCH)
        given = self.arguments[number] if 0 <= number < len(self.arguments) else None
        if not isinstance(given, bytes):
            return None
        return self._same(int.from_bytes(given[place : place + size], "little"))

    def _read(self, operand: str) -> Value:
        """Return a register or an integer; None for a floating-point number or a symbol."""
        if operand.startswith("%"):
            return self.registers.get(operand)
        return self._same(int(operand.rstrip("U"), 0)) if _IMMEDIATE.fullmatch(operand) else None

    def _same(self, value: int) -> Lanes:
        return np.full(self.threads, value % (1 << 64), dtype=np.uint64)


def _parts(value: Value, opcode: str, count: int) -> list[Value]:
    """Take a register apart, into as many of equal width, the lowest bits first."""
    if value is None or count == 1:
        return [value] * count
    bits = width(opcode.rpartition(".")[2]) // count
    return [truncate(value >> np.uint64(bits * place), bits) for place in range(count)]


def _joined(parts: list[Value], opcode: str) -> Value:
    """Put a register together from several, the lowest bits first."""
    bits = width(opcode.rpartition(".")[2]) // len(parts)
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    shifted = [truncate(part, bits) << np.uint64(bits * place) for place, part in enumerate(known)]
    return functools.reduce(np.bitwise_or, shifted)


def _merge(before: Value, value: Value, active: Value) -> Value:
    """Return the lanes of a register after `value` was written where `active`."""
    if active is None or not active.any():
        return before if active is not None else None
    if active.all():
        return value
    return None if before is None or value is None else np.where(active, value, before)


def _access_bits(opcode: str) -> int:
    """Return the bits that one thread moves: `ld.global.v4.b32` moves 128."""
    vector = re.search(r"\.v(\d)\b", opcode)
    return width(opcode.rpartition(".")[2]) * (int(vector[1]) if vector else 1)
