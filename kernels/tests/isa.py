"""What native code computes on each instruction set, in a process for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import hashlib, sys, torch
import kernel_cases
from leap_kernels import _native, use_backend
torch.manual_seed(0)
digest = hashlib.sha256()
with use_backend("native", strict=True):
{code}
for result in results:
    digest.update(result.contiguous().view(kernel_cases.WORDS.get(result.dtype, torch.uint8)).numpy().tobytes())
print(_native.describe().split(",")[1].strip(), digest.hexdigest())
"""


def hash_on_every_isa(code: str) -> set[str]:
    """Return the digests of the tensors that `code`, which puts them into a list `results`, computes."""
    printed = []
    here = Path(__file__).parent
    shared = os.pathsep.join(map(str, (here, here.parents[1] / "tests" / "support")))
    indented = "\n".join(f"    {line}" for line in code.splitlines())
    for isa in ("baseline", "avx2", "avx512"):
        environment = {**os.environ, "LEAP_NATIVE_ISA": isa, "PYTHONPATH": shared}
        command = [sys.executable, "-c", PROGRAM.format(code=indented)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.split())
    assert printed[0][0] == "baseline"
    return {digest for _, digest in printed}
