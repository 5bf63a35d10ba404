"""Parameters a second of `adamw_8bit_step_`, on the CPU or a GPU, beside the 8-bit step of bitsandbytes.

    python benchmarks/host_adamw.py --threads 2
    python benchmarks/host_adamw.py --device cuda

Both step the same bfloat16 weights and states with a bfloat16 gradient, in turns, so that a machine with other work
slows both. Prints one JSON object: the medians of each, and the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from importlib import metadata
from typing import Any

import bitsandbytes.functional as bnb
import torch
from leap_kernels import Adam8bitState, adamw_8bit_step_, use_backend
from leap_kernels._moments import MAP1, MAP2
from leap_kernels.tools.bench import processor
from leap_kernels.tools.bench_measures import Clock
from leap_kernels.tools.report import provenance

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-5, 0.9, 0.999, 1e-8, 0.01


class Setting:
    """Weights as a transformer has them, a gradient, and the state after a first step."""

    def __init__(self, count: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = (0.03 * torch.randn(count, generator=generator)).bfloat16().to(device)
        self.gradient = (1e-3 * torch.randn(count, generator=generator)).bfloat16().to(device)
        self.state = Adam8bitState.zeros_like(self.weights)
        self.maps = MAP1.to(device), MAP2.to(device)
        self.backend = "native" if device.type == "cpu" else "triton"
        self.step = 0
        self.ours()

    def ours(self) -> None:
        self.step += 1
        offset = self.step * self.weights.numel()
        numbers: dict[str, Any] = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": WEIGHT_DECAY}
        with use_backend(self.backend, strict=True):
            adamw_8bit_step_(self.weights, self.gradient, self.state, **numbers, step=self.step, seed=0, offset=offset)

    def bitsandbytes(self) -> None:
        self.step += 1
        state1, absmax1, state2, absmax2 = self.state.tensors()
        numbers = (BETA1, BETA2, 0.0, 0.0, EPS, self.step, LR)
        maps = (*self.maps, absmax1, absmax2, WEIGHT_DECAY)
        bnb.optimizer_update_8bit_blockwise("adam", self.gradient, self.weights, state1, state2, *numbers, *maps)


def measure(count: int, repeats: int, threads: int, device: torch.device) -> dict[str, Any]:
    """Millions of parameters a second, and how many times faster the op is."""
    torch.set_num_threads(threads)
    setting, clock = Setting(count, device), Clock(device)
    turns = [(clock.seconds(setting.bitsandbytes)[0], clock.seconds(setting.ours)[0]) for _ in range(repeats + 1)][1:]
    rates = [[count / time / 1e6 for time in times] for times in zip(*turns, strict=True)]
    return {
        "parameters": count,
        "threads": threads,
        "repeats": repeats,
        "bitsandbytes_millions_per_second": statistics.median(rates[0]),
        "ours_millions_per_second": statistics.median(rates[1]),
        "times_faster": statistics.median(theirs / ours for theirs, ours in turns),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        **provenance(),
        "bitsandbytes": metadata.version("bitsandbytes"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=1 << 24)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.parameters, arguments.repeats, arguments.threads, arguments.device)))
