"""`bench`: every op against plain PyTorch and torch.compile, forward and backward, on the device that is there.

The variants of a case take turns within each repeat, beginning with another one each time, so that a machine that
slows down slows all of them alike. A turn is a few calls in a row, of which the median counts; speeds are compared
within a repeat, and the median of those ratios is given. Memory that a call frees stays with the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .._dispatch import BackendUnavailable
from .bench_case import DTYPE, Case
from .bench_cases import CASES, SIZES
from .bench_measures import keep_freed_memory
from .bench_runs import COPIES, Bench, Key, Seconds, Variant
from .report import ToolError, provenance, text_table

REPEATS, QUICK_REPEATS = 20, 4
HEADER = ("variant", "pass", "ms [quartiles]", "GB/s", "of copy", "of clone", "faster than", "error", "peak MB")


def add_commands(commands: Any) -> None:
    """Add `bench` to the command line."""
    parser = commands.add_parser("bench", help="time the ops against plain PyTorch and torch.compile")
    ops = sorted({case.op for case in CASES})
    parser.add_argument("--op", action="append", choices=ops, help="only this op; may be given several times")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--quick", action="store_true", help="one tiny size, few repeats, without torch.compile")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(execute=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure what was asked for and print it, case by case."""
    before = torch.get_num_threads()
    if arguments.threads is not None and arguments.threads < 1:
        raise ToolError(f"--threads needs a number of at least 1, not {arguments.threads}.")
    torch.set_num_threads(arguments.threads or before)
    keep_freed_memory()
    try:
        for case in CASES:
            if arguments.op and case.op not in arguments.op:
                continue
            sizes = [("quick", case.quick)] if arguments.quick else list((case.sizes or SIZES).items())
            # A case without latents has but a handful of samples on any size.
            for size, shape in sizes if case.latents else sizes[:1]:
                _show(measure(case, size, shape, quick=arguments.quick), arguments.json)
    finally:
        torch.set_num_threads(before)
    return 0


def _show(lines: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print("\n".join(map(json.dumps, lines)), flush=True)
        return
    shape = " x ".join(map(str, lines[0]["shape"]))
    print(f"{lines[0]['case']}, {lines[0]['size']}: {shape}\n{text_table(HEADER, map(row, lines))}\n", flush=True)


def measure(case: Case, size: str, shape: tuple[int, ...], quick: bool = False) -> list[dict[str, Any]]:
    """Run every variant of a case on latents of `shape`, and return a JSON object for each variant and pass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(case, shape, device)
    variants = list(_variants(bench, compiled=not quick))
    seconds = bench.take_turns(variants, QUICK_REPEATS if quick else REPEATS)
    observed: dict[Key, dict[str, Any]] = {}
    for variant in variants:
        observed |= bench.observe(variant)
    about = {
        "case": case.name,
        "op": case.op,
        "size": size,
        "shape": shape,
        "dtype": str(DTYPE).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "repeats": QUICK_REPEATS if quick else REPEATS,
        **provenance(),
    }
    return [{**about, **_speed(key, seconds, bench.least_bytes), **observed.get(key, {})} for key in seconds]


def _variants(bench: Bench, compiled: bool) -> Iterator[Variant]:
    """Yield the variants that run here; say on stderr which do not, and why."""
    backend = "triton" if bench.device.type == "cuda" else "native"
    wanted = [Variant("eager", bench.case.plain), Variant(backend, bench.case.fused, backend)]
    if compiled:
        torch.compiler.reset()
        wanted.insert(1, Variant("compile", torch.compile(bench.case.plain, fullgraph=True, dynamic=False)))
    for variant in wanted:
        try:
            bench.forward(variant)
        except (BackendUnavailable, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"{bench.case.name}: no {variant.name} variant: {error}", file=sys.stderr)
        else:
            yield variant


def _speed(key: Key, seconds: Seconds, least_bytes: dict[str, int]) -> dict[str, Any]:
    """Describe the times of one variant and pass, also against the others', repeat by repeat."""
    name, direction = key
    times, least = seconds[key], least_bytes[direction]
    faster = {o: _paired(seconds[o, at], times) for o, at in seconds if at == direction and o != name}
    shares = {
        copy: _paired(seconds[copy, copy], times) * least / least_bytes[copy]
        for copy in COPIES
        if (copy, copy) in seconds
    }
    return {
        "variant": name,
        "pass": direction,
        "milliseconds": [1e3 * quartile for quartile in statistics.quantiles(times, n=4)],
        "least_bytes": least,
        # A pass that need not move anything has no rate.
        "gigabytes_per_second": least / statistics.median(times) / 1e9 if least else None,
        "share_of_copy_rate": shares.get("copy") if least else None,
        "share_of_clone_rate": shares.get("clone") if least else None,
        "times_faster_than": faster,
    }


def _paired(theirs: list[float], ours: list[float]) -> float:
    """Return how many times longer theirs took, in the median of the repeats."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def row(line: dict[str, Any]) -> tuple[str, ...]:
    """Return a line's cells under `HEADER`."""
    low, median, high = line["milliseconds"]
    rate, peak = line["gigabytes_per_second"], line.get("peak_bytes")
    shares = (line["share_of_copy_rate"], line["share_of_clone_rate"])
    faster = [f"{other} {ratio:.2f}x" for other, ratio in line["times_faster_than"].items()]
    return (
        line["variant"],
        line["pass"],
        f"{median:.3f} [{low:.3f}, {high:.3f}]",
        "-" if rate is None else f"{rate:.2f}",
        *("-" if share is None else f"{share:.0%}" for share in shares),
        ", ".join(faster) or "-",
        f"{line['error']:.1e}" if "error" in line else "-",
        "-" if peak is None else f"{peak / 1e6:.2f}",
    )


def processor() -> str:
    """Return the CPU's name as Linux knows it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
