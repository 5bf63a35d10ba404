"""Compiles every Triton kernel for every target and prints what the machine code shows, one JSON object a line.

`audit` runs this module in a process of its own: Triton decides when a kernel is decorated whether it will be
compiled or interpreted, so the process that asks may be unable to compile.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from .._catalog import OPS
from .._specs import KernelSpec
from .._triton import triton
from .gpus import NOT_MEASURED, ROOFLINE_SHAPE, TARGETS, Target, occupancy, roofline_microseconds
from .machine_code import MachineCode, read_cdna, read_sass
from .ptx import Argument, Traffic, address_of, count_traffic

# The walk takes the second program of the first sample: a full one, with a neighbour on either side.
_PROGRAM = 1
_PROGRAMS_PER_SAMPLE = 16
_SAMPLES = 2


def main() -> None:
    """Print a line for every kernel and target."""
    for op in OPS:
        for spec in op.kernels:
            dtype = torch.bfloat16 if torch.bfloat16 in spec.dtypes else spec.dtypes[0]
            for target in TARGETS:
                print(json.dumps(examine(spec, dtype, target)), flush=True)


def examine(spec: KernelSpec, dtype: torch.dtype, target: Target) -> dict[str, Any]:
    """Compile `spec` for latents of `dtype` and `target`, and describe the result."""
    compiled = compile_kernel(spec, dtype, target)
    shared = compiled.metadata.shared
    if target.backend == "cuda":
        code = _disassemble(compiled.asm["cubin"])
        counted = _count(spec, dtype, target, compiled.asm["ptx"], code)
    else:
        code = read_cdna(compiled.asm["amdgcn"])
        counted = _not_counted(code)
    rate = counted["bytes_per_element"] or spec.least_bytes(dtype)
    return {
        "kernel": spec.name,
        "target": target.name,
        "dtype": str(dtype).removeprefix("torch."),
        "registers": code.registers,
        "spills": code.spills,
        "shared_bytes": shared,
        "atomics": code.atomics,
        **counted,
        "least_bytes_per_element": spec.least_bytes(dtype),
        "machine_accesses": {f"{kind} {bits}": count for (kind, bits), count in sorted(code.accesses.items())},
        "elements_per_program": spec.elements,
        "num_warps": spec.num_warps,
        "occupancy": occupancy(target, code.registers, shared, spec.num_warps),
        # Where the elements are samples, there are too few of them for memory to set the time.
        "roofline": None if "batch" in spec.arguments else _roofline(target, rate),
    }


def _roofline(target: Target, bytes_per_element: float) -> dict[str, Any]:
    time = roofline_microseconds(target, bytes_per_element)
    return {"gpu": target.gpu, "shape": ROOFLINE_SHAPE, "microseconds": time, "status": NOT_MEASURED}


def compile_kernel(spec: KernelSpec, dtype: torch.dtype, target: Target) -> Any:
    """Return Triton's compiled kernel, for aligned tensors whose sizes are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = spec.aligned()
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(spec.kernel.arg_names) if name in aligned}
    source = ASTSource(spec.kernel, spec.signature(dtype), constexprs=dict(spec.constexprs), attrs=attributes)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options={"num_warps": spec.num_warps, "enable_fp_fusion": spec.fp_fusion})


def _count(spec: KernelSpec, dtype: torch.dtype, target: Target, ptx: str, code: MachineCode) -> dict[str, Any]:
    """Walk through one full program, and check that the machine code has kept the PTX's accesses whole."""
    size = spec.elements * _PROGRAMS_PER_SAMPLE
    tables = _tables(spec, size)
    # Sizes that fill every program; what else is an integer counts the programs of a sample.
    arguments = [
        tables.get(name) if kind.startswith("*") else size if name in spec.aligned() else _PROGRAMS_PER_SAMPLE
        for name, kind in spec.arguments.items()
    ]
    threads = target.warp_size * spec.num_warps
    traffic = count_traffic(ptx, arguments, threads, _PROGRAM, _PROGRAMS_PER_SAMPLE * _SAMPLES)
    # A program that does not ask which one it is runs alone and takes all elements.
    moved = traffic.bytes_moved / (spec.elements if "%ctaid" in ptx else size)
    few = [number for number, name in enumerate([*spec.arguments, *spec.row]) if name in spec.per_group]
    per_element = Traffic(tuple(access for access in traffic.accesses if access.argument not in few))
    widths = {("store" if a.stores else "load", a.bits) for a in traffic.accesses if not a.opcode.startswith("red")}
    return {
        "vector_bits": per_element.vector_bits,
        "widths_agree": widths == set(code.accesses),
        "bytes_per_element": moved,
        "bytes_ratio": moved / spec.least_bytes(dtype),
    }


def _tables(spec: KernelSpec, size: int) -> dict[str, Argument]:
    """Return what is in the tables of a launch for many tensors: one row, on which all programs work."""
    known = {"programs": _PROGRAMS_PER_SAMPLE * _SAMPLES, "count": size * _SAMPLES}
    words = [
        address_of(len(spec.arguments) + number) if name.endswith("_ptr") else known.get(name, 0)
        for number, name in enumerate(spec.row)
    ]
    row = b"".join(word.to_bytes(8, "little") for word in words)
    return {"rows_ptr": row, "row_of_ptr": bytes(4 * _PROGRAMS_PER_SAMPLE * _SAMPLES)}


def _not_counted(code: MachineCode) -> dict[str, Any]:
    """Return the width of most loads: those of tensors, as what all lanes share comes through scalar loads."""
    loads = {bits: count for (kind, bits), count in code.accesses.items() if kind == "load"}
    width = max(loads, key=lambda bits: loads[bits], default=None)
    return {"vector_bits": width, "widths_agree": None, "bytes_per_element": None, "bytes_ratio": None}


def _disassemble(cubin: bytes) -> MachineCode:
    """Read a cubin with the disassemblers that come inside Triton's wheel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def output(*command: str) -> str:
            done = subprocess.run([tools / command[0], *command[1:], path], capture_output=True, text=True, check=True)
            return done.stdout

        return read_sass(output("nvdisasm", "-c"), output("cuobjdump", "-res-usage"))


if __name__ == "__main__":
    main()
