"""Everything that waits for a GPU, in one go: what passes, how fast it is, and whether the computed figures were right.

    python -m benchmarks.gpu_report --profile configs/flux1_dev/80gb.yaml

Writes gpu_report.json and prints it as Markdown. A part that fails says so, and the others go on. The step of
FLUX.1-dev's size has random weights, so that nothing is downloaded; it is left out where its memory would not suffice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from leap_kernels.tools.report import provenance
from torch import Tensor

from benchmarks.tables import markdown
from leapalign.cli.doctor import diagnose
from leapalign.config import Config, load_config
from leapalign.inputs.paths import path_argument
from leapalign.inputs.validation import UserError, brief
from leapalign.memory.residency import Stage, watched
from leapalign.memory.transfer import Lane, pinned
from leapalign.planning.model_skeleton import skeleton, skeleton_trainer
from leapalign.planning.simulate import GPUS, Simulation, gib, simulate, step_seconds

ROOT = Path(__file__).parents[1]
TINY, PROFILE = ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "flux1_dev" / "80gb.yaml"
ON_DEVICE = ("optimizer.name=adamw_8bit", "rollout.batch_size=8", "memory.checkpointing=blocks")
ON_HOST = (*ON_DEVICE, "memory.optimizer=host")
PLACES = {"device": ON_DEVICE, "host": ON_HOST, "streamed": (*ON_HOST, "memory.weights=streamed")}
ROLLOUTS = 2
"""In a measured step: the first makes gradients, the second adds to them, as all others would."""
RESERVE = 2 << 30
"""Bytes to spare for a GPU's libraries and fragmentation, and for the host's system."""

Part = Callable[[], Any]


def parts(device: torch.device, profile: Path) -> dict[str, Part]:
    """What the report consists of, by name."""
    tiny = {
        f"tiny model, {place}": partial(measured_step, load_config(TINY, asked), device)
        for place, asked in PLACES.items()
    }
    return {
        "machine": diagnose,
        "tests": lambda: command("-m", "pytest", "-m", "cuda", "--no-header", "-p", "no:cacheprovider"),
        "bandwidth": lambda: bandwidth(device, 1 << 30),
        **tiny,
        f"FLUX.1-dev's size, {profile.stem}": lambda: large_step(load_config(profile), device),
        "kernels": lambda: [json.loads(line) for line in command("-m", "leap_kernels", "bench", "--json").splitlines()],
    }


def assembled(chosen: dict[str, Part]) -> dict[str, Any]:
    """Each part's result, or what it raised; `seconds` is how long it took."""
    report: dict[str, Any] = {"about": provenance()}
    for name, part in chosen.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        try:
            report[name] = {"result": part()}
        except Exception as error:  # one part's failure is a finding, and the rest are wanted
            report[name] = {"failed": f"{type(error).__name__}: {brief(error)}"}
        report[name]["seconds"] = time.perf_counter() - begin
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
    return report


def command(*arguments: str) -> str:
    """What a Python command prints. Raises RuntimeError with its last lines where it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-180:]}")
    return done.stdout


def bandwidth(device: torch.device, size: int) -> dict[str, float]:
    """GB/s between pinned host memory and the device, one way at a time: the best of five copies of ``size`` bytes."""
    lane, like = Lane(device), torch.zeros(1, dtype=torch.uint8)
    host, there = pinned(size, like, device).fill_(1), lane.device_memory(size, like)

    def seconds(target: Tensor, source: Tensor) -> float:
        lane.finish()
        begin = time.perf_counter()
        lane.copy(target, source, after=lane.mark()).synchronize()
        return time.perf_counter() - begin

    ways = {"to_device": (there, host), "to_host": (host, there)}
    return {name: size / min(seconds(*way) for _ in range(5)) / 1e9 for name, way in ways.items()}


def large_step(config: Config, device: torch.device) -> dict[str, Any]:
    """`measured_step`, where the simulation says that it fits. Raises UserError where it does not."""
    found = simulate(two_rollouts(config))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if found.device_peak + RESERVE > free or found.host_peak + RESERVE > memory:
        raise UserError(
            f"needs {gib(found.device_peak)} GiB of the device and {gib(found.host_peak)} of the host, and there are "
            f"{gib(free)} and {gib(memory)}; choose a smaller --profile"
        )
    return measured_step(config, device, found)


def two_rollouts(config: Config) -> Config:
    """With the optimizer step after `ROLLOUTS` rollouts."""
    size = ROLLOUTS * min(config.rollout.batch_size, config.train.batch_size)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


def measured_step(config: Config, device: torch.device, found: Simulation | None = None) -> dict[str, Any]:
    """An iteration of two rollouts on random weights: seconds and peaks, beside those computed.

    The first iteration warms up and is not timed.
    """
    config = two_rollouts(config)
    found = found or simulate(config)
    home = torch.device("cpu") if config.memory.optimizer == "host" else device
    trainer = skeleton_trainer(config, skeleton(config, home, ROLLOUTS), device)
    trainer.train_one()
    seconds, peaks, trainer.iteration = Counter[Stage](), Counter[Stage](), 1
    with watched(lambda name: _measuring(name, device, seconds, peaks)):
        metrics = trainer.train_one()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    computed = {gpu: step_seconds(found, gpu) for gpu in GPUS if gpu.split()[-1] in name}
    return {
        "seconds": dict(seconds),
        "seconds_computed": next(iter(computed.values()), None),
        "peak_bytes": dict(peaks),
        "peak_bytes_simulated": {stage: peak.total for stage, peak in found.device.items()},
        "metrics": metrics,
    }


@contextlib.contextmanager
def _measuring(name: Stage, device: torch.device, seconds: Counter[Stage], peaks: Counter[Stage]) -> Iterator[None]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    yield
    if on_gpu:
        torch.cuda.synchronize(device)
        peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device))
    seconds[name] += time.perf_counter() - begin


def page(report: dict[str, Any]) -> str:
    """The report in Markdown; steps stage by stage, the rest as it is but for its length."""
    lines = ["# GPU report", "", ", ".join(f"{key} {value}" for key, value in report["about"].items())]
    for name, part in list(report.items())[1:]:
        lines += ["", f"## {name} ({part['seconds']:.0f} s)", ""]
        result = part.get("result")
        if "failed" in part:
            lines.append(f"**Failed.** {part['failed']}")
        elif isinstance(result, dict) and "peak_bytes_simulated" in result:
            lines.append(_stages(result))
        else:
            lines.append(f"```\n{(result if isinstance(result, str) else json.dumps(result))[:2000]}\n```")
    return "\n".join(lines)


def _stages(step: dict[str, Any]) -> str:
    computed = step["seconds_computed"] or {}

    def row(stage: str, seconds: float) -> list[str]:
        ideal = computed.get(stage)
        peaks = [step[key].get(stage) for key in ("peak_bytes", "peak_bytes_simulated")]
        cells = [f"{ideal['compute']:.2f} / {ideal['transfer']:.2f}" if ideal else "-"]
        return [stage, f"{seconds:.2f}", *cells, *("-" if size is None else f"{gib(size)}" for size in peaks)]

    rows = [row(*item) for item in step["seconds"].items()]
    return markdown(["stage", "s measured", "s computed: compute / transfer", "GiB measured", "GiB simulated"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("profile", PROFILE), ("output", Path("gpu_report.json"))):
        parser.add_argument(f"--{name}", type=path_argument, default=default)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_report: PyTorch finds no GPU here; run this on a machine that has one", file=sys.stderr)
        return 2
    report = assembled(parts(torch.device("cuda", torch.cuda.current_device()), arguments.profile))
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(page(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
