"""The audit on kernels that waste memory, compiled by Triton: what the bars are there to catch must be caught."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import leap_kernels
import pytest
from apart import printed_by
from leap_kernels.tools.audit import misses

KERNELS = """
import json
import torch
import triton
import triton.language as tl
from leap_kernels._specs import KernelSpec
from leap_kernels.tools.audit_compile import examine
from leap_kernels.tools.gpus import TARGETS

def launcher(kernel, programs):
    def on(inputs):
        x, out = inputs.latents(2)
        per_sample = inputs.count if programs == 1 else inputs.per_sample
        return lambda: kernel[(programs,)](x, out, per_sample, 17, 1024)
    return on

@triton.jit
def copies(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))

@triton.jit
def reads_twice(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + at).to(tl.float32))
    again = tl.load(x_ptr + at, volatile=True).to(tl.float32)
    tl.store(out_ptr + at, (again * total).to(tl.bfloat16))

@triton.jit
def strides(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at * 16))

@triton.jit
def misaligned(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at + blocks))

@triton.jit
def loops_over_the_sample(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    block = tl.program_id(0) % blocks
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, per_sample, BLOCK):
        total += tl.load(x_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr + block * BLOCK + tl.arange(0, BLOCK), total.to(tl.bfloat16))

@triton.jit
def alone(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    for start in range(0, per_sample, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < per_sample), mask=at < per_sample)

@triton.jit
def rounds(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, (tl.load(x_ptr + at).to(tl.float32) + 0.3).to(tl.bfloat16))

@triton.jit
def rounds_towards_zero(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32) + 0.3
    tl.store(out_ptr + at, x.to(tl.bfloat16, fp_downcast_rounding="rtz"))

@triton.jit
def cut(x):
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)

@triton.jit
def cuts_off(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, cut(tl.load(x_ptr + at).to(tl.float32) + 0.3))

@triton.jit
def rounds_some(x_ptr, out_ptr, per_sample, blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32) + 0.3
    tl.store(out_ptr + at, tl.where(x > 1, cut(x), x.to(tl.bfloat16)))

arguments = {"x_ptr": "*T", "out_ptr": "*T", "per_sample": "i32", "blocks": "i32"}
wasteful = (copies, reads_twice, strides, misaligned, loops_over_the_sample, alone)
for kernel in (*wasteful, rounds, rounds_towards_zero, cuts_off, rounds_some):
    spec = KernelSpec(kernel.__name__, kernel, arguments, {"BLOCK": 1024}, ("T",), ("T",), 1024)
    launch = launcher(kernel, 1 if kernel is alone else 34)
    print(json.dumps(examine(spec, torch.bfloat16, TARGETS[1], launch)))
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kernels")
    script = folder / "kernels_that_waste.py"
    script.write_text(KERNELS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.triton
def test_wasted_memory_shows(lines) -> None:
    expected = {
        "copies": (128, 4),
        "reads_twice": (128, 6),
        # Every element sits in a sector of its own.
        "strides": (16, 32 + 2),
        # What begins within a sector ends in one more.
        "misaligned": (16, 4 + 32 / 1024),
        # Each of the sample's 17 blocks reads all 17.
        "loops_over_the_sample": (128, 17 * 2 + 2),
        # A single program, over as many elements as there are.
        "alone": (128, 4),
    }
    found = {name: (line["vector_bits"], line["bytes_per_element"]) for name, line in lines.items()}
    assert {name: found[name] for name in expected} == expected
    assert all(line["widths_agree"] and line["spills"] == 0 for line in lines.values())


@pytest.mark.triton
def test_numbers_that_are_not_rounded_to_nearest_show(lines) -> None:
    expected = {
        "copies": "copied",
        "rounds": "nearest even",
        "rounds_towards_zero": "towards zero",
        "cuts_off": "cut",
        "rounds_some": "cut and nearest even",
    }
    assert {name: lines[name]["roundings"]["out_ptr"] for name in expected} == expected
    assert {name for name in expected if misses(lines[name])} == {"rounds_towards_zero", "cuts_off", "rounds_some"}


AUDIT = """
import importlib, json, sys
import torch

for package, name in json.loads(sys.argv[1]):
    catalog, audit, compiled, gpus = (
        importlib.import_module(f"{package}.{module}")
        for module in ("_catalog", "tools.audit", "tools.audit_compile", "tools.gpus")
    )
    (spec,) = (spec for op in catalog.OPS for spec in op.kernels if spec.name == name)
    try:
        print(json.dumps(audit.misses(compiled.examine(spec, torch.bfloat16, gpus.TARGETS[1]))))
    except ValueError as error:
        print(json.dumps([str(error)]))
"""
ADD = "accumulate_kernel[(triton.cdiv(count, BLOCK),)](total, value, count, BLOCK)"
ROUND = "tl.store(out_ptr + at, (x / (1 + tl.exp(-z))).to(out_ptr.dtype.element_ty), mask=inside)"
# Kernel, what its file says, what it says instead, what the audit says of that.
MUTANTS = [
    ("accumulate_", "BLOCK = 1024", "BLOCK = 1024", None),
    ("accumulate_", ADD, ADD[:-1] + ", num_warps=1)", "launched as in the catalog (num_warps 1, not 4)"),
    ("accumulate_", ADD, ADD.replace("value,", "value.clone(),"), "bytes at most 1.05 x least"),
    ("accumulate_", ADD, ADD.replace("cdiv(count, BLOCK)", "cdiv(2 * count, BLOCK)"), "(programs 68, not 34)"),
    (
        "accumulate_",
        "(old + value).to(total_ptr.dtype.element_ty)",
        # A lone sum of two float32, the compiler would turn back into one of float32.
        "(old.to(tl.float64) * (1 + 1e-12) + value).to(total_ptr.dtype.element_ty)",
        "no float64",
    ),
    (
        "accumulate_",
        ADD,
        ADD.replace("BLOCK)", "BLOCK // 2)"),
        "accumulate_ is launched with [{'BLOCK': 512}]; the catalog says once with {'BLOCK': 1024}",
    ),
    ("gelu_tanh", "BLOCK = 1024", "BLOCK = 1024", None),
    ("gelu_tanh", ROUND, ROUND.replace("ty)", 'ty, "rtz")'), "rounding (out_ptr: towards zero)"),
    ("gelu_tanh", ROUND, ROUND.replace("+ at", "+ at * 2"), "bytes at most 1.05 x least"),
    ("swiglu", "_block(out.shape[-1])\n", "_block(out.shape[-1]) // 2\n", "(programs 68, not 34; BLOCK 512, not 1024)"),
]


@pytest.mark.slow
@pytest.mark.triton
def test_what_spoils_a_launcher_or_its_kernel_is_found(tmp_path: Path) -> None:
    """In copies of the package under names of their own."""
    for number, (kernel, good, bad, _) in enumerate(MUTANTS):
        package = shutil.copytree(Path(leap_kernels.__file__).parent, tmp_path / f"mutant_{number}")
        file = package / f"{kernel.rstrip('_')}.py"
        source = file.read_text()
        assert source.count(good) == 1
        file.write_text(source.replace(good, bad))
    asked = json.dumps([(f"mutant_{number}", kernel) for number, (kernel, *_) in enumerate(MUTANTS)])
    found = printed_by(AUDIT, tmp_path / "cache", asked, PYTHONPATH=str(tmp_path))
    for missed, (*mutant, miss) in zip(found, MUTANTS, strict=True):
        assert missed == [] if miss is None else any(miss in name for name in missed), (mutant, missed)
