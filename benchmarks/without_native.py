"""How much longer host work takes without the native library: the ops of the optimizer and of the average, each by it
and by the reference in plain PyTorch.

    python benchmarks/without_native.py --threads 1

Both take turns on one set of tensors; the factor is the median of their ratios, turn by turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from leap_kernels import Adam8bitState, adamw_8bit_step_, ema_update_, use_backend


def cases(elements: int) -> dict[str, Callable[[], object]]:
    """What is timed, by op, on bfloat16 weights with float32 gradients and a float32 average."""
    torch.manual_seed(0)
    weights = torch.randn(elements, dtype=torch.bfloat16)
    gradient, average, state = torch.randn(elements), torch.randn(elements), Adam8bitState.zeros_like(weights)
    numbers = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    return {
        "adamw_8bit_step_": lambda: adamw_8bit_step_(weights, gradient, state, **numbers, step=1, seed=0, offset=0),
        "ema_update_": lambda: ema_update_(average, weights, 0.99),
    }


def seconds(backend: str, run: Callable[[], object]) -> float:
    with use_backend(backend, strict=True):
        started = time.perf_counter()
        run()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for op, run in cases(arguments.elements).items():
        seconds("native", run)  # brings memory and library in
        turns = [(seconds("native", run), seconds("reference", run)) for _ in range(arguments.repeats)]
        native, reference = (statistics.median(times) for times in zip(*turns, strict=True))
        factor = statistics.median(plain / fast for fast, plain in turns)
        about = {"elements": arguments.elements, "threads": arguments.threads, "repeats": arguments.repeats}
        print(json.dumps({"op": op, **about, "native_s": native, "reference_s": reference, "factor": factor}))


if __name__ == "__main__":
    main()
