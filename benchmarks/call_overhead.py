"""What a call of each op costs where its tensors are so small that their elements do not count, beside plain PyTorch.

    python benchmarks/call_overhead.py

The cases are those of `python -m leap_kernels bench`, on a few float32 elements and without a gradient. The two take
turns of a hundred calls on one thread, and the fastest turn of each counts: what slows a turn is other work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from leap_kernels.tools.bench_case import Inputs
from leap_kernels.tools.bench_cases import CASES

CALLS = 100


def microseconds(run: Callable[[Inputs], object], inputs: Inputs) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        run(inputs)
    return 1e6 * (time.perf_counter() - started) / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=200)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    for case in CASES:
        inputs = {name: value.detach() for name, value in case.inputs(case.quick, torch.device("cpu")).items()}
        # What is rounded stays bfloat16.
        inputs = {name: value if name == "dst" else value.float() for name, value in inputs.items()}
        with torch.no_grad():
            times = [[microseconds(run, inputs) for run in (case.fused, case.plain)] for _ in range(turns)]
        ours, plain = (min(of_each) for of_each in zip(*times, strict=True))
        print(json.dumps({"case": case.name, "op_us": ours, "plain_us": plain, "ratio": ours / plain}), flush=True)


if __name__ == "__main__":
    main()
