"""Reads registers, spills, shared memory and access widths from disassembled machine code."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# NVIDIA: LDG loads, STG stores, LDGSTS copies to shared memory. A modifier such as LTC128B is no width.
_SASS = re.compile(r"\b(?P<name>LDGSTS|LDG|STG|LDL|STL|ATOMG?|REDG?)(?P<modifiers>(?:\.\w+)*)\s")
_SASS_FLOAT64 = re.compile(r"\b(?:D(?:ADD|MUL|FMA|SETP|MNMX|MMA)|(?:F2F|F2I|I2F|FRND|MUFU)[.\w]*\.(?:F64|\w*64H))\b")
_SASS_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
# AMD: vector memory through an address in registers or a buffer descriptor; s_load serves what all lanes share.
_CDNA = re.compile(r"^\s*(?:global|buffer|flat)_(?P<name>load|store|atomic)_(?P<width>\w+)", re.M)
_CDNA_FLOAT64 = re.compile(r"^\s*v_\w*_f64", re.M)
_CDNA_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}


@dataclass(frozen=True)
class MachineCode:
    """What one kernel's machine code uses.

    `spills` counts spilled values: instructions on local memory for NVIDIA, spilled registers for AMD. `accesses`
    counts global memory instructions by kind (load, store) and bits; `float64` those that compute in float64, or
    convert. A loop's body counts once.
    """

    registers: int
    spills: int
    atomics: int
    float64: int
    accesses: Counter[tuple[str, int]]


def read_sass(disassembly: str, resource_usage: str) -> MachineCode:
    """Read the outputs of `nvdisasm -c` and `cuobjdump -res-usage` for a cubin with one kernel."""
    names: Counter[str] = Counter()
    accesses: Counter[tuple[str, int]] = Counter()
    for found in _SASS.finditer(disassembly):
        names[found["name"]] += 1
        if found["name"] in ("LDG", "STG", "LDGSTS"):
            widths = [_SASS_WIDTHS[m] for m in found["modifiers"].split(".") if m in _SASS_WIDTHS]
            accesses["store" if found["name"] == "STG" else "load", widths[0] if widths else 32] += 1
    registers = re.search(r"\bREG:(\d+)", resource_usage)
    if registers is None:
        raise ValueError("cuobjdump names no registers")
    atomics = sum(count for name, count in names.items() if name.startswith(("ATOM", "RED")))
    float64 = len(_SASS_FLOAT64.findall(disassembly))
    return MachineCode(int(registers[1]), names["LDL"] + names["STL"], atomics, float64, accesses)


def read_cdna(assembly: str) -> MachineCode:
    """Read the assembly of an AMD kernel with its metadata."""
    accesses: Counter[tuple[str, int]] = Counter()
    atomics = 0
    for found in _CDNA.finditer(assembly):
        if found["name"] == "atomic":
            atomics += 1
        else:
            kind = re.split(r"_d16|_", found["width"])[0]
            accesses[found["name"], _CDNA_WIDTHS[kind]] += 1
    spills = _metadata(assembly, "vgpr_spill_count") + _metadata(assembly, "sgpr_spill_count")
    float64 = len(_CDNA_FLOAT64.findall(assembly))
    return MachineCode(_metadata(assembly, "vgpr_count"), spills, atomics, float64, accesses)


def _metadata(assembly: str, key: str) -> int:
    found = re.search(rf"^\s*-?\s*\.{key}:\s*(\d+)", assembly, re.M)
    if found is None:
        raise ValueError(f"the assembly has no .{key}")
    return int(found[1])
