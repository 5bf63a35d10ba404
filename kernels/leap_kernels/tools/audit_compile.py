"""Compiles what the ops launch for every target and prints what the machine code shows, one JSON object a line.

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
from .launch_cases import LAUNCHERS
from .launches import Inputs, Launch, Launcher, recorded
from .machine_code import MachineCode, read_cdna, read_sass
from .ptx import Argument, Traffic, address_of, count_traffic

# The walk takes the second program of the first sample: a full one, with a neighbour on either side.
_PROGRAM = 1
# No multiple of 16, for which Triton would compile a version of its own; the sizes are such multiples.
_PROGRAMS_PER_SAMPLE = 17
_SAMPLES = 2


def main() -> None:
    """Print a line for every kernel and target."""
    for op in OPS:
        for spec in op.kernels:
            dtype = torch.bfloat16 if torch.bfloat16 in spec.dtypes else spec.dtypes[0]
            for target in TARGETS:
                print(json.dumps(examine(spec, dtype, target)), flush=True)


def examine(spec: KernelSpec, dtype: torch.dtype, target: Target, launcher: Launcher | None = None) -> dict[str, Any]:
    """Compile what `launcher` launches of `spec` for latents of `dtype` and `target`, and describe the result.

    The launcher is that of the op, unless another is given.
    """
    inputs = Inputs(_SAMPLES, spec.elements * _PROGRAMS_PER_SAMPLE, dtype)
    launch, torch_bytes = launched(spec, inputs, target, launcher)
    compiled = launch.compiled
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    if target.backend == "cuda":
        code = _disassemble(compiled.asm["cubin"])
        counted = _count(spec, launch, inputs, torch_bytes, target, code)
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
        "float64_instructions": code.float64,
        **counted,
        "least_bytes_per_element": spec.least_bytes(dtype),
        "machine_accesses": {f"{kind} {bits}": count for (kind, bits), count in sorted(code.accesses.items())},
        "elements_per_program": inputs.count // launch.programs,
        "num_warps": num_warps,
        "launched_otherwise": _otherwise(spec, launch, inputs),
        "occupancy": occupancy(target, code.registers, shared, num_warps),
        # Where the elements are samples, there are too few of them for memory to set the time.
        "roofline": None if "batch" in spec.arguments else _roofline(target, rate),
    }


def _roofline(target: Target, bytes_per_element: float) -> dict[str, Any]:
    time = roofline_microseconds(target, bytes_per_element)
    return {"gpu": target.gpu, "shape": ROOFLINE_SHAPE, "microseconds": time, "status": NOT_MEASURED}


def launched(spec: KernelSpec, inputs: Inputs, target: Target, launcher: Launcher | None = None) -> tuple[Launch, int]:
    """Return the launch of `spec`, and the bytes that PyTorch's operations move beside the launcher's launches.

    Raises:
        ValueError: if the launcher does not launch the kernel once with the constants of `spec`.
    """
    done = recorded(launcher or LAUNCHERS[spec.name], inputs, target)
    with_constants = [launch.constexprs for launch in done.launches if launch.kernel is spec.kernel]
    if with_constants.count(dict(spec.constexprs)) != 1:
        raise ValueError(
            f"{spec.name} is launched with {with_constants or 'nothing'}; the catalog says once with {spec.constexprs}"
        )
    found = next(
        launch for launch in done.launches if launch.kernel is spec.kernel and launch.constexprs == spec.constexprs
    )
    return found, done.torch_bytes


def _otherwise(spec: KernelSpec, launch: Launch, inputs: Inputs) -> list[str]:
    """Say in what the launch differs from the catalog."""
    metadata, signature = launch.compiled.metadata, spec.signature(inputs.dtype)
    pairs = {
        "num_warps": (metadata.num_warps, spec.num_warps),
        "fp_fusion": (metadata.enable_fp_fusion, spec.fp_fusion),
        "programs": (launch.programs, 1 if "batch" in spec.arguments else inputs.count // spec.elements),
        **{name: (kind, signature.get(name)) for name, kind in launch.signature.items()},
    }
    return [f"{what} {found}, not {said}" for what, (found, said) in pairs.items() if found != said]


def walked(launch: Launch, program: int, target: Target, spec: KernelSpec, count: int) -> Traffic:
    """Walk through one program of a launch of `spec` for `count` elements."""
    tables = _tables(spec, launch, count)
    arguments = [
        tables.get(name) if isinstance(value, torch.Tensor) else value if isinstance(value, int) else 0
        for name, value in launch.parameters.items()
    ]
    threads = target.warp_size * launch.compiled.metadata.num_warps
    return count_traffic(launch.compiled.asm["ptx"], arguments, threads, program, launch.programs)


def _count(
    spec: KernelSpec, launch: Launch, inputs: Inputs, torch_bytes: int, target: Target, code: MachineCode
) -> dict[str, Any]:
    """Walk through one full program, and check that the machine code has kept the PTX's accesses whole."""
    traffic = walked(launch, min(_PROGRAM, launch.programs - 1), target, spec, inputs.count)
    beside = torch_bytes / inputs.count
    moved = traffic.bytes_moved * launch.programs / inputs.count + beside
    few = [number for number, name in enumerate([*launch.parameters, *spec.row]) if name in spec.per_group]
    per_element = Traffic(tuple(access for access in traffic.accesses if access.argument not in few))
    widths = {("store" if a.stores else "load", a.bits) for a in traffic.accesses if not a.opcode.startswith("red")}
    return {
        "vector_bits": per_element.vector_bits,
        "widths_agree": widths == set(code.accesses),
        "bytes_per_element": moved,
        "torch_bytes_per_element": beside,
        "bytes_ratio": moved / spec.least_bytes(inputs.dtype),
    }


def _tables(spec: KernelSpec, launch: Launch, count: int) -> dict[str, Argument]:
    """Return what is in the tables of a launch for many tensors: one row, on which all programs work."""
    known = {"programs": launch.programs, "count": count}
    words = [
        address_of(len(launch.parameters) + number) if name.endswith("_ptr") else known.get(name, 0)
        for number, name in enumerate(spec.row)
    ]
    row = b"".join(word.to_bytes(8, "little") for word in words)
    return {"rows_ptr": row, "row_of_ptr": bytes(4 * launch.programs)}


def _not_counted(code: MachineCode) -> dict[str, Any]:
    """Return the width of most loads: those of tensors, as what all lanes share comes through scalar loads."""
    loads = {bits: count for (kind, bits), count in code.accesses.items() if kind == "load"}
    width = max(loads, key=lambda bits: loads[bits], default=None)
    return {
        "vector_bits": width,
        "widths_agree": None,
        "bytes_per_element": None,
        "torch_bytes_per_element": None,
        "bytes_ratio": None,
    }


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
