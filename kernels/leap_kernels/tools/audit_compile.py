"""Compiles what the ops launch for every target and prints what the machine code shows, one JSON object a line.

`audit` runs this module in a process of its own: Triton decides when a kernel is decorated whether it will be
compiled or interpreted, so the process that asks may be unable to compile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .._catalog import OPS
from .._specs import LATENTS, KernelSpec
from .._triton import triton
from .gpus import NOT_MEASURED, ROOFLINE_SHAPE, TARGETS, Target, occupancy, roofline_microseconds
from .launch_cases import LAUNCHERS
from .launches import Inputs, Launch, Launcher, recorded
from .machine_code import MachineCode, read_cdna, read_sass
from .ptx import Argument, Traffic, address_of, count_traffic
from .ptx_parse import parse
from .roundings import roundings

# The walk takes the second program of the first sample: a full one, with a neighbour on either side.
_PROGRAM = 1
_SAMPLES = 2
_DTYPES = (torch.bfloat16, torch.float32)


def main() -> None:
    """Print a line for every kernel, dtype and target, or those of the op that the command line names."""
    for op in OPS:
        for spec in op.kernels if op.name in (sys.argv[1:] or [op.name]) else ():
            for dtype in audited(spec):
                for target in TARGETS:
                    print(json.dumps(examine(spec, dtype, target)), flush=True)


def audited(spec: KernelSpec) -> tuple[torch.dtype, ...]:
    """Return the dtypes of the latents that a kernel is held to the bars in: float16 is to memory what bfloat16 is."""
    if not any(LATENTS in kind for kind in spec.arguments.values()):
        return spec.dtypes[:1]
    return tuple(dtype for dtype in _DTYPES if dtype in spec.dtypes)


def examine(spec: KernelSpec, dtype: torch.dtype, target: Target, launcher: Launcher | None = None) -> dict[str, Any]:
    """Compile what `launcher` launches of `spec` for latents of `dtype` and `target`, and describe the result.

    The launcher is that of the op, unless another is given.
    """
    inputs = Inputs(_SAMPLES, spec.elements * spec.programs, dtype)
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
        "sums_only": spec.sums_only,
        "rounded_stochastically": spec.stochastic,
        "launched_otherwise": _otherwise(spec, launch, inputs),
        "occupancy": occupancy(target, code.registers, shared, num_warps),
        # Where the elements are samples or sums, there are too few of them for memory to set the time.
        "roofline": None if "batch" in spec.arguments or spec.sums_only else _roofline(target, rate),
    }


def _roofline(target: Target, bytes_per_element: float) -> dict[str, Any]:
    time = roofline_microseconds(target, bytes_per_element)
    return {"gpu": target.gpu, "shape": ROOFLINE_SHAPE, "microseconds": time, "status": NOT_MEASURED}


def launched(spec: KernelSpec, inputs: Inputs, target: Target, launcher: Launcher | None = None) -> tuple[Launch, int]:
    """Return the launch of `spec`, and the bytes that PyTorch's operations move beside the launcher's launches.

    Raises:
        ValueError: if the launcher does not launch the kernel once with the constants of `spec`, save those that
            follow from the shape.
    """
    done = recorded(launcher or LAUNCHERS[spec.name], inputs, target)
    fixed = {name: value for name, value in spec.constexprs.items() if name not in spec.shaped}
    with_kernel = [launch for launch in done.launches if launch.kernel is spec.kernel]
    found = [launch for launch in with_kernel if fixed.items() <= launch.constexprs.items()]
    if len(found) != 1:
        launched_with = [launch.constexprs for launch in with_kernel] or "nothing"
        raise ValueError(f"{spec.name} is launched with {launched_with}; the catalog says once with {fixed}")
    return found[0], done.torch_bytes


def _otherwise(spec: KernelSpec, launch: Launch, inputs: Inputs) -> list[str]:
    """Say in what the launch differs from the catalog."""
    metadata, signature = launch.compiled.metadata, spec.signature(inputs.dtype)
    pairs = {
        "num_warps": (metadata.num_warps, spec.num_warps),
        "fp_fusion": (metadata.enable_fp_fusion, spec.fp_fusion),
        "programs": (launch.programs, 1 if "batch" in spec.arguments else inputs.count // spec.elements),
        **{name: (kind, signature.get(name)) for name, kind in launch.signature.items()},
        **{name: (launch.constexprs[name], spec.constexprs[name]) for name in spec.shaped},
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
    names = [*launch.parameters, *spec.row]

    def without(left_out: tuple[str, ...]) -> Traffic:
        return Traffic(tuple(a for a in traffic.accesses if a.argument is None or names[a.argument] not in left_out))

    own = without(spec.common).bytes_moved
    of_all = launch.programs / inputs.count
    per_element, moved = without(spec.per_group), own * of_all + beside
    widths = {("store" if a.stores else "load", a.bits) for a in traffic.accesses if not a.opcode.startswith("red")}
    return {
        "vector_bits": per_element.vector_bits,
        "widths_agree": widths == set(code.accesses),
        "bytes_per_element": moved,
        "common_bytes_per_element": (traffic.bytes_moved - own) * of_all,
        "torch_bytes_per_element": beside,
        "bytes_ratio": None if spec.sums_only else moved / spec.least_bytes(inputs.dtype),
        "roundings": _roundings(spec, launch, traffic, names),
    }


def _roundings(spec: KernelSpec, launch: Launch, traffic: Traffic, names: list[str]) -> dict[str, str]:
    """Say of each tensor of 16 bits an element that is written how its numbers were made."""
    instructions, _ = parse(launch.compiled.asm["ptx"])
    narrow = {name for name, kind in launch.signature.items() if kind in ("*bf16", "*fp16")}
    accesses = [(a, names[a.argument]) for a in traffic.accesses if a.argument is not None]
    copies = [access.position for access, name in accesses if name in narrow and not access.stores]
    stores: dict[str, list[int]] = {}
    for access, name in accesses:
        if access.stores and name in narrow:
            stores.setdefault(name, []).append(access.position)
    return {name: " and ".join(sorted(roundings(instructions, at, copies))) for name, at in stores.items()}


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
        "common_bytes_per_element": None,
        "roundings": None,
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
