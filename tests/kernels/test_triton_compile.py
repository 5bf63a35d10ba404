"""Compiles the Triton kernels for GPUs that are not here, with Triton's compiler, not its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from leap_kernels import leap_update
kernels = sys.modules["leap_kernels.leap_update"]

def assembly(kernel, pointers, constants, capability):
    sizes = {"per_sample": "i32", "blocks": "i32"}
    signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (position,): aligned
        for position, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name == "per_sample"
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm

results = []
for capability in (80, 90):
    for dtype in ("*fp32", "*bf16", "*fp16"):
        latents = dict.fromkeys(("x_ptr", "velocity_ptr", "target_ptr"), dtype)
        forward = {**latents, "delta_ptr": "*fp32", "out_ptr": dtype, "partial_ptr": "*fp32"}
        backward = {"grad_ptr": dtype, "delta_ptr": "*fp32", "out_ptr": dtype}
        block = {"BLOCK": kernels.BLOCK}
        for name, kernel, pointers, constants in (
            ("leap", kernels._forward_kernel, forward, {"HAS_TARGET": False, **block}),
            ("connector", kernels._forward_kernel, forward, {"HAS_TARGET": True, **block}),
            ("backward", kernels._backward_kernel, backward, block),
        ):
            asm = assembly(kernel, pointers, constants, capability)
            results.append([f"{name} {dtype} sm_{capability}", asm["ptx"], len(asm["cubin"])])
print(json.dumps(results))
"""


@pytest.mark.triton
def test_compiles_for_ampere_and_hopper(tmp_path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 18
    for name, ptx, size in results:
        assert size > 0, name
        # Sums must not depend on the order in which blocks finish.
        assert "atom." not in ptx, name
        assert "red.global" not in ptx, name
        # Aligned latents move 128 bits at a time, in and out.
        assert "ld.global.v4.b32" in ptx, name
        assert "st.global.v4.b32" in ptx, name
