"""`audit`: what the compiled Triton kernels use and move, for GPUs that need not be there."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from .. import _triton
from .._catalog import OPS
from .gpus import NOT_MEASURED, ROOFLINE_SHAPE
from .report import ToolError, provenance, text_table
from .roundings import BITS, COPIED, NEAREST

# The bars that every kernel has to clear on every NVIDIA target.
VECTOR_BITS = 128
BYTES_RATIO = 1.05


def add_commands(commands: Any) -> None:
    """Add `audit` to the command line."""
    parser = commands.add_parser("audit", help="compile the Triton kernels without a GPU and read their machine code")
    parser.add_argument("--op", choices=[op.name for op in OPS], metavar="OP", help="only this op")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(execute=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the audit; the exit code is 1 if a kernel misses a bar."""
    lines = []
    for line in audit(arguments.op):
        lines.append(line)
        if arguments.json:
            print(json.dumps(line), flush=True)
        elif sys.stderr.isatty():
            print(f"\r{line['kernel']} for {line['target']}\033[K", end="", file=sys.stderr, flush=True)
    if not arguments.json:
        print(("\r\033[K" if sys.stderr.isatty() else "") + summary(lines))
    return 1 if any(line["misses"] for line in lines) else 0


def audit(op: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a JSON object for each kernel, dtype and target, in the order of the catalog, or for those of one op.

    Raises:
        ToolError: if there is no Triton, or a kernel does not compile or cannot be counted.
    """
    if _triton.MISSING:
        raise ToolError(f"audit needs Triton's compiler, but {_triton.MISSING}: install triton (Linux only).")
    versions = provenance()
    with tempfile.TemporaryDirectory() as cache:
        # None of Triton's settings: the interpreter cannot compile, and overrides would change what is read.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, "-m", f"{__package__}.audit_compile", *([] if op is None else [op])]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as compiler,
        ):
            assert compiler.stdout is not None
            for printed in compiler.stdout:
                line = json.loads(printed)
                yield {**line, "misses": misses(line), **versions}
            if compiler.wait() != 0:
                errors.seek(0)
                raise ToolError(f"a kernel could not be audited: {errors.read().strip().splitlines()[-1]}")


def misses(line: dict[str, Any]) -> list[str]:
    """Name the bars that a kernel misses; for AMD the bar is that it compiles."""
    if not line["target"].startswith("sm_"):
        return []
    few = line["sums_only"]
    wrong = [
        name for name, how in line["roundings"].items() if not _rounded(how, name in line["rounded_stochastically"])
    ]
    bars = {
        "spills": line["spills"] == 0,
        "atomics": line["atomics"] == 0,
        "no float64": line["float64_instructions"] == 0,
        f"accesses of {VECTOR_BITS} bits": few or ((line["vector_bits"] or 0) >= VECTOR_BITS and line["widths_agree"]),
        f"bytes at most {BYTES_RATIO} x least": few or line["bytes_ratio"] <= BYTES_RATIO,
        f"rounding ({'; '.join(f'{name}: ' + line['roundings'][name] for name in wrong)})": not wrong,
        f"launched as in the catalog ({'; '.join(line['launched_otherwise'])})": not line["launched_otherwise"],
    }
    return [name for name, cleared in bars.items() if not cleared]


def _rounded(how: str, stochastically: bool) -> bool:
    """Say whether numbers were rounded as they should be; what is copied need not be."""
    if stochastically:
        return BITS in how and NEAREST not in how
    return how in (NEAREST, COPIED)


def _called(line: dict[str, Any], name: str) -> str:
    return "stochastic" if name in line["rounded_stochastically"] else str(line["roundings"][name])


HEADER = (
    "kernel",
    "dtype",
    "target",
    "registers",
    "spills",
    "shared B",
    "vector bits",
    "B/element",
    "least",
    "ratio",
    "occupancy",
    "roofline",
    "roundings",
)


def row(line: dict[str, Any]) -> tuple[str, ...]:
    """Return a line's cells under `HEADER`."""
    counted = line["bytes_per_element"] is not None
    return (
        line["kernel"],
        line["dtype"],
        line["target"],
        str(line["registers"]),
        str(line["spills"]),
        str(line["shared_bytes"]),
        str(line["vector_bits"]),
        f"{line['bytes_per_element']:.3f}" if counted else "not counted",
        str(line["least_bytes_per_element"]),
        "-" if line["bytes_ratio"] is None else f"{line['bytes_ratio']:.4f}",
        f"{line['occupancy']:.0%}",
        f"{line['roofline']['microseconds']:.1f} us on {line['roofline']['gpu']}" if line["roofline"] else "-",
        ", ".join(sorted({_called(line, name) for name in line["roundings"] or {}})) or "-",
    )


def summary(lines: list[dict[str, Any]]) -> str:
    """Return the audit as a table, with a verdict below."""
    size = " x ".join(map(str, ROOFLINE_SHAPE))
    missed = [
        f"{line['kernel']} for {line['target']} misses: {', '.join(line['misses'])}" for line in lines if line["misses"]
    ]
    note = f"roofline: latents of {size}, {NOT_MEASURED}"
    verdict = missed or [f"all {len(lines)} meet the bars"]
    return "\n".join([text_table(HEADER, map(row, lines)), note, *verdict])
