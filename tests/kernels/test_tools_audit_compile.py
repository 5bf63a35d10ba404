"""The audit on kernels that waste memory, compiled by Triton: what the bars are there to catch must be caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = """
import json
import torch
import triton
import triton.language as tl
from leap_kernels._specs import KernelSpec
from leap_kernels.tools.audit_compile import examine
from leap_kernels.tools.gpus import TARGETS

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

arguments = {"x_ptr": "*T", "out_ptr": "*T", "per_sample": "i32", "blocks": "i32"}
for kernel in (copies, reads_twice, strides, misaligned, loops_over_the_sample, alone):
    spec = KernelSpec(kernel.__name__, kernel, arguments, {"BLOCK": 1024}, ("T",), ("T",), 1024)
    print(json.dumps(examine(spec, torch.bfloat16, TARGETS[1])))
"""


@pytest.mark.triton
def test_wasted_memory_shows(tmp_path: Path) -> None:
    script = tmp_path / "kernels_that_waste.py"
    script.write_text(KERNELS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"]: (line["vector_bits"], line["bytes_per_element"]) for line in lines} == {
        "copies": (128, 4),
        "reads_twice": (128, 6),
        # Every element sits in a sector of its own.
        "strides": (16, 32 + 2),
        "misaligned": (16, 4),
        # Each of the sample's 16 blocks reads all 16.
        "loops_over_the_sample": (128, 16 * 2 + 2),
        # A single program, over as many elements as there are.
        "alone": (128, 4),
    }
    assert all(line["widths_agree"] and line["spills"] == 0 for line in lines)
