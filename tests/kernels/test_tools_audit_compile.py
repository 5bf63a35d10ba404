"""The audit on kernels that waste memory, compiled by Triton: what the bars are there to catch must be caught."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import leap_kernels
import pytest

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

arguments = {"x_ptr": "*T", "out_ptr": "*T", "per_sample": "i32", "blocks": "i32"}
for kernel in (copies, reads_twice, strides, misaligned, loops_over_the_sample, alone):
    spec = KernelSpec(kernel.__name__, kernel, arguments, {"BLOCK": 1024}, ("T",), ("T",), 1024)
    launch = launcher(kernel, 1 if kernel is alone else 34)
    print(json.dumps(examine(spec, torch.bfloat16, TARGETS[1], launch)))
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
        # What begins within a sector ends in one more.
        "misaligned": (16, 4 + 32 / 1024),
        # Each of the sample's 17 blocks reads all 17.
        "loops_over_the_sample": (128, 17 * 2 + 2),
        # A single program, over as many elements as there are.
        "alone": (128, 4),
    }
    assert all(line["widths_agree"] and line["spills"] == 0 for line in lines)


AUDIT_ONE = """
import json
import torch
from mutated_kernels._catalog import OPS
from mutated_kernels.tools.audit import misses
from mutated_kernels.tools.audit_compile import examine
from mutated_kernels.tools.gpus import TARGETS

(spec,) = (spec for op in OPS for spec in op.kernels if spec.name == "accumulate_")
for target in TARGETS[:3]:
    print(json.dumps(misses(examine(spec, torch.bfloat16, target))))
"""
LAUNCH = "accumulate_kernel[(triton.cdiv(count, BLOCK),)](total, value, count, BLOCK)"


def run_without_interpreter(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("good", "bad", "miss"),
    [
        ("BLOCK = 1024", "BLOCK = 1024", None),
        (LAUNCH, LAUNCH[:-1] + ", num_warps=1)", "launched as in the catalog (num_warps 1, not 4)"),
        (LAUNCH, LAUNCH.replace("value,", "value.clone(),"), "bytes at most 1.02 x least"),
        (LAUNCH, LAUNCH.replace("cdiv(count, BLOCK)", "cdiv(2 * count, BLOCK)"), "(programs 68, not 34)"),
        (
            "(old + value).to(total_ptr.dtype.element_ty)",
            # A lone sum of two float32, the compiler would turn back into one of float32.
            "(old.to(tl.float64) * (1 + 1e-12) + value).to(total_ptr.dtype.element_ty)",
            "no float64",
        ),
    ],
)
def test_what_spoils_a_launcher_or_its_kernel_is_found(good: str, bad: str, miss: str | None, tmp_path: Path) -> None:
    """In a copy of the package under a name of its own."""
    package = shutil.copytree(Path(leap_kernels.__file__).parent, tmp_path / "mutated_kernels")
    source = (package / "accumulate.py").read_text()
    assert source.count(good) == 1
    (package / "accumulate.py").write_text(source.replace(good, bad))
    done = run_without_interpreter(AUDIT_ONE, tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3
    for misses in found:
        assert misses == [] if miss is None else any(miss in name for name in misses), misses


@pytest.mark.triton
def test_a_launcher_that_does_not_launch_what_the_catalog_says_is_refused(tmp_path: Path) -> None:
    package = shutil.copytree(Path(leap_kernels.__file__).parent, tmp_path / "mutated_kernels")
    source = (package / "accumulate.py").read_text()
    (package / "accumulate.py").write_text(source.replace(LAUNCH, LAUNCH.replace("BLOCK)", "BLOCK // 2)")))
    done = run_without_interpreter(AUDIT_ONE, tmp_path)
    assert done.stderr.strip().splitlines()[-1] == (
        "ValueError: accumulate_ is launched with [{'BLOCK': 512}]; the catalog says once with {'BLOCK': 1024}"
    )
