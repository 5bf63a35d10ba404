"""What the GPU report measures: copies between host and device, and steps on random weights beside their simulation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leapalign.config import Config
from leapalign.inputs.validation import UserError
from leapalign.memory.residency import Stage, watched
from leapalign.memory.transfer import Lane, pinned
from leapalign.planning.model_skeleton import skeleton, skeleton_trainer
from leapalign.planning.simulate import GPUS, Simulation, gib, simulate, step_seconds

ROLLOUTS = 2
"""In a measured step: the first makes gradients, the second adds to them, as all others would."""
RESERVE = 2 << 30
"""Bytes to spare for a GPU's libraries and fragmentation, and for the host's system."""


def bandwidth(device: torch.device, size: int) -> dict[str, float]:
    """GB/s between pinned host memory and the device, one way at a time: the best of five copies of ``size`` bytes.

    Beside them, under `bytes`, the size.
    """
    lane, like = Lane(device), torch.zeros(1, dtype=torch.uint8)
    host, there = pinned(size, like, device).fill_(1), lane.device_memory(size, like)

    def seconds(target: Tensor, source: Tensor) -> float:
        lane.finish()
        begin = time.perf_counter()
        lane.copy(target, source, after=lane.mark()).synchronize()
        return time.perf_counter() - begin

    ways = {"to_device": (there, host), "to_host": (host, there)}
    rates = {name: size / min(seconds(*way) for _ in range(5)) / 1e9 for name, way in ways.items()}
    return {"bytes": size, **rates}


def host_memory() -> int:
    """Bytes of the host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: torch.device) -> int:
    """Free bytes of the device, whose memory is the host's where it is the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()


def large_step(config: Config, device: torch.device) -> dict[str, Any]:
    """`measured_step`, where the simulation says that it fits. Raises UserError where it does not."""
    found = simulate(two_rollouts(config))
    free, memory = free_memory(device), host_memory()
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
    seconds, peaks, reserved, trainer.iteration = Counter[Stage](), Counter[Stage](), Counter[Stage](), 1
    with watched(lambda name: measuring(name, device, seconds, peaks, reserved)):
        metrics = trainer.train_one()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    computed = {gpu: step_seconds(found, gpu) for gpu in GPUS if gpu.split()[-1] in name}
    return {
        "seconds": dict(seconds),
        "seconds_computed": next(iter(computed.values()), None),
        "peak_bytes": dict(peaks),
        "peak_bytes_reserved": dict(reserved),
        "bytes_reserved_simulated": found.reserved,
        "peak_bytes_simulated": {stage: peak.total for stage, peak in found.device.items()},
        "metrics": metrics,
    }


@contextlib.contextmanager
def measuring(
    name: Stage,
    device: torch.device,
    seconds: Counter[Stage],
    peaks: Counter[Stage],
    reserved: Counter[Stage],
) -> Iterator[None]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    yield
    if on_gpu:
        torch.cuda.synchronize(device)
        peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device))
        reserved[name] = max(reserved[name], torch.cuda.max_memory_reserved(device))
    seconds[name] += time.perf_counter() - begin
