"""Compiles the Triton kernels for a GPU that is not here, with Triton's compiler, not its interpreter.

In every dtype, on one GPU; `test_tools_audit.py` takes every GPU, in one dtype.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json
from leap_kernels._catalog import OPS
from leap_kernels.tools.audit_compile import launched
from leap_kernels.tools.gpus import TARGETS
from leap_kernels.tools.launches import Inputs
hopper = next(target for target in TARGETS if target.name == "sm_90")
for spec in {spec.name: spec for op in OPS for spec in op.kernels}.values():
    for dtype in spec.dtypes:
        launch, _ = launched(spec, Inputs(2, 16 * spec.elements, dtype), hopper)
        print(json.dumps([f"{spec.name} {dtype}", bool(spec.writes), launch.compiled.asm["ptx"]]))
"""


@pytest.mark.triton
def test_compiles_every_kernel_in_every_dtype(tmp_path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) > 30
    for name, writes, ptx in results:
        # Sums must not depend on the order in which blocks finish.
        assert "atom." not in ptx, name
        assert "red.global" not in ptx, name
        # Aligned latents move 128 bits at a time, in and out.
        assert "ld.global.v4.b32" in ptx, name
        assert not writes or "st.global.v4.b32" in ptx, name
