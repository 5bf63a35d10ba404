"""How much faster a training iteration of the tiny world is with its networks patched to the ops of leap_kernels.

    python benchmarks/patched_iteration.py > benchmarks/results/patched_iteration.jsonl

One trainer takes turns: an iteration as PyTorch computes it, and one patched. The factor is the median of the ratios
of neighbouring turns, in seconds of the processor on one thread, which other work on the machine disturbs less than the
clock. With --profile, what takes the time of one iteration of each kind, instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from leap_kernels import explain, patch
from torch.profiler import profile

from leapalign.config import load_config
from leapalign.trainer import Trainer


def turn(trainer: Trainer, patched: bool) -> float:
    """Take one iteration; return its seconds."""
    done = [patch(network) for network in (trainer.model.transformer, trainer.model.decoder) if patched and network]
    started = time.process_time()
    trainer.train_one()
    seconds = time.process_time() - started
    for one in done:
        one.undo()
    return seconds


def measured(trainer: Trainer, turns: int) -> dict[str, object]:
    for patched in (False, True):
        turn(trainer, patched)  # brings memory and library in
    eager, fast = zip(*((turn(trainer, False), turn(trainer, True)) for _ in range(turns)), strict=True)
    ratios = [plain / quick for plain, quick in zip(eager, fast, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "turns": turns,
        "backend": next(one.backend for one in explain() if (one.op, one.device) == ("gelu_tanh", "cpu")),
        "eager_s": statistics.median(eager),
        "patched_s": statistics.median(fast),
        "factor": statistics.median(ratios),
        "quartiles": [low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("overrides", nargs="*", help="keys of the tiny config, such as rollout.num_steps=5")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer.from_config(load_config(Path("tiny"), arguments.overrides))
    if not arguments.profile:
        print(json.dumps(measured(trainer, arguments.turns)))
        return
    for patched in (False, True):
        turn(trainer, patched)
        with profile() as recorded:
            turn(trainer, patched)
        print("patched" if patched else "eager")
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
