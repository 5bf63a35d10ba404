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

from .._catalog import OPS, KernelSpec
from .._triton import triton
from .gpus import NOT_MEASURED, ROOFLINE_SHAPE, TARGETS, Target, occupancy, roofline_microseconds
from .machine_code import MachineCode, read_cdna, read_sass
from .ptx import Traffic, count_traffic

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
    traffic = None
    if target.backend == "cuda":
        threads = target.warp_size * spec.num_warps
        programs = _PROGRAMS_PER_SAMPLE * _SAMPLES
        traffic = count_traffic(compiled.asm["ptx"], _launch_arguments(spec), threads, _PROGRAM, programs)
        code = _disassemble(compiled.asm["cubin"])
    else:
        code = read_cdna(compiled.asm["amdgcn"])
    return _describe(spec, dtype, target, code, compiled.metadata.shared, traffic)


def compile_kernel(spec: KernelSpec, dtype: torch.dtype, target: Target) -> Any:
    """Return Triton's compiled kernel, for aligned tensors whose sizes are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = spec.aligned()
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(spec.kernel.arg_names) if name in aligned}
    source = ASTSource(spec.kernel, spec.signature(dtype), constexprs=dict(spec.constexprs), attrs=attributes)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options={"num_warps": spec.num_warps})


def _launch_arguments(spec: KernelSpec) -> list[int | None]:
    """Return values for a launch: sizes that fill every program, and elsewhere the number of programs a sample has."""
    size = spec.elements * _PROGRAMS_PER_SAMPLE
    return [
        None if kind.startswith("*") else size if name in spec.aligned() else _PROGRAMS_PER_SAMPLE
        for name, kind in spec.arguments.items()
    ]


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


def _describe(
    spec: KernelSpec, dtype: torch.dtype, target: Target, code: MachineCode, shared: int, traffic: Traffic | None
) -> dict[str, Any]:
    least = spec.least_bytes(dtype)
    moved = None if traffic is None else traffic.bytes_moved / spec.elements
    return {
        "kernel": spec.name,
        "target": target.name,
        "dtype": str(dtype).removeprefix("torch."),
        "registers": code.registers,
        "spills": code.spills,
        "shared_bytes": shared,
        "atomics": code.atomics,
        "vector_bits": traffic.vector_bits if traffic else _commonest_width(code),
        "machine_accesses": {f"{kind} {bits}": count for (kind, bits), count in sorted(code.accesses.items())},
        # None for AMD, whose machine code this audit does not walk through.
        "widths_agree": None if traffic is None else _widths(traffic) == set(code.accesses),
        "bytes_per_element": moved,
        "least_bytes_per_element": least,
        "bytes_ratio": None if moved is None else moved / least,
        "elements_per_program": spec.elements,
        "num_warps": spec.num_warps,
        "occupancy": occupancy(target, code.registers, shared, spec.num_warps),
        "roofline": {
            "gpu": target.gpu,
            "shape": ROOFLINE_SHAPE,
            "microseconds": roofline_microseconds(target, least if moved is None else moved),
            "status": NOT_MEASURED,
        },
    }


def _widths(traffic: Traffic) -> set[tuple[str, int]]:
    """Return the kinds and widths of accesses in the PTX: the assembler must not have cut them up."""
    return {("store" if a.stores else "load", a.bits) for a in traffic.accesses if not a.opcode.startswith("red")}


def _commonest_width(code: MachineCode) -> int | None:
    """Return the width most instructions have, the narrower of two: that of the tensors, not of a scalar."""
    return min(code.accesses, key=lambda access: (-code.accesses[access], access[1]), default=(None, None))[1]


if __name__ == "__main__":
    main()
