"""Whether a configuration fits a GPU, in words and as JSON, and which setting to change where it does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from leapalign.config import Config
from leapalign.inputs.validation import UserError
from leapalign.memory.residency import Role, Stage
from leapalign.planning.allowance import allowance
from leapalign.planning.ledger import Peak
from leapalign.planning.simulate import GPUS, HOST_BANDWIDTH, Simulation, gib, run_hours, step_seconds
from leapalign.reports.pages import text_table

_WAYS = ("to_device", "to_host")
_UNITS = {"GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6}


def parse_size(text: str) -> int:
    """Bytes in "80GiB" or "24 GB". Raises UserError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].upper() not in _UNITS or found[1].count(".") > 1:
        raise UserError(f"'{text}' is no amount of memory; write 80GiB or 24GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def summary(found: Simulation, probe: Peak, gpu_memory: int, config: Config) -> dict[str, Any]:
    """What `leapalign memory --json` prints; probe: a step of `leapalign probe`."""
    return {
        "device_peak_bytes": found.device_peak,
        "device_reserved_bytes": found.reserved,
        "allowance_bytes": allowance(gpu_memory),
        "host_peak_bytes": found.host_peak,
        "trainable_parameters": found.trainable_parameters,
        "stages": {
            name: {
                "device_peak_bytes": peak.total,
                "by_role": dict(peak.by_role),
                "host_peak_bytes": found.host.get(name, Peak()).total,
                "host_by_role": dict(found.host.get(name, Peak()).by_role),
            }
            for name, peak in found.device.items()
        },
        "probe": {"device_peak_bytes": probe.total, "by_role": dict(probe.by_role)},
        "pcie_bytes": {way: int(sum(size for (_, w), size in found.traffic.items() if w == way)) for way in _WAYS},
        "flops": {name: int(count) for name, count in found.flops.items()},
        "seconds_computed_not_measured": {gpu: step_seconds(found, gpu) for gpu in GPUS},
        "hours_computed_not_measured": {gpu: run_hours(found, gpu, config.train.iterations) for gpu in GPUS},
        "gpu_memory_bytes": gpu_memory,
        "fits": fits(found, gpu_memory),
        "advice": advice(found, gpu_memory, config),
    }


def fits(found: Simulation, gpu_memory: int) -> bool:
    """Whether a card sold with ``gpu_memory`` bytes has what the allocator reserves, and the allowance."""
    return found.reserved + allowance(gpu_memory) <= gpu_memory


def advice(found: Simulation, gpu_memory: int, config: Config) -> str | None:
    """The setting to change first, None where the configuration fits."""
    if fits(found, gpu_memory):
        return None
    if allowance(gpu_memory) >= gpu_memory:
        return f"take another card: driver, context and libraries alone need {gib(allowance(gpu_memory))} GiB"
    name, peak = max(found.device.items(), key=lambda e: e[1].total)
    return change(name, peak.by_role, config)


def change(name: Stage, by_role: Mapping[Role, int], config: Config) -> str:
    """The setting to change where the memory ran out in stage ``name``, with ``by_role`` alive; cheapest in speed."""
    memory = config.memory
    role = max(by_role, key=lambda r: by_role[r])
    if name == "reward" and by_role.get("reward", 0) > by_role.get("activations", 0):
        if config.train.reward_chunk != 1:
            return "set train.reward_chunk to 1: the reward stage is the largest"
        if not memory.checkpoint_decoder:
            return "set memory.checkpoint_decoder to true: the reward stage is the largest"
    if role == "reward" and memory.rewards == "resident":
        return "set memory.rewards to host: theirs are the largest part of the weights"
    if memory.checkpointing == "none":
        return "set memory.checkpointing to blocks: activations are kept whole"
    if name in ("sampling", "watch"):
        return "reduce rollout.batch_size: so many images are decoded at once between iterations"
    if name == "surrogate" and config.train.microbatch != 1:
        return "set train.microbatch to 1: the surrogate's activations are at the peak"
    if config.model.adapted and config.model.quantization is None and memory.weights == "resident":
        return "set model.quantization to nf4: weights that stay frozen may have four bits"
    if memory.optimizer == "device" and not config.model.adapted:
        return f"set memory.optimizer to host: {role} are the largest part, and gradients and moments can leave"
    if memory.weights == "resident" and config.model.quantization is None:
        return "set memory.weights to streamed: the weights are the largest part"
    return "reduce rollout.batch_size, or the size of the images"


def explanation(found: Simulation, probe: Peak, gpu_memory: int, config: Config) -> str:
    """The same for a reader."""
    rows = [_row(name, peak, found.host.get(name)) for name, peak in found.device.items()]
    rows.append(_row("leapalign probe", probe, None))
    verdict = "fits" if fits(found, gpu_memory) else "does not fit"
    lines = [
        f"{found.trainable_parameters:,} trainable parameters; device peak {gib(found.device_peak)} GiB, with the "
        f"allocator's gaps {gib(found.reserved)}, and an allowance of {gib(allowance(gpu_memory))} for driver, context "
        f"and libraries: {verdict} {gib(gpu_memory)} GiB; host peak {gib(found.host_peak)} GiB",
        "",
        text_table(("stage", "GiB", "host, GiB", "of the device's, at that moment"), rows),
        "",
        "Seconds an iteration, computed and not measured: FLOPs of products and bytes that the rest moves in the "
        "device's memory, one after the other, and transfers beside them, at a GPU's full rates; the host's work from "
        f"bytes at {HOST_BANDWIDTH / 1e9:.0f} GB/s:",
        "",
        text_table(("GPU", "stage", "compute", "memory", "transfer", "host", "transfer / compute"), _seconds(found)),
    ]
    iterations = config.train.iterations
    hours = ", ".join(f"{run_hours(found, gpu, iterations):.1f} hours on one {gpu}" for gpu in GPUS)
    lines += ["", f"The {iterations} iterations of the run, by what takes longest of each stage: {hours}."]
    if config.rollout.cache is not None:
        lines.append("Blocks that rollout.cache will leave out are counted: how many these are, the images decide.")
    change = advice(found, gpu_memory, config)
    return "\n".join([*lines, *(["", f"To fit: {change}."] if change else [])])


def _row(name: str, device: Peak, host: Peak | None) -> tuple[str, ...]:
    parts = ", ".join(f"{role} {gib(size)}" for role, size in sorted(device.by_role.items(), key=lambda e: -e[1]))
    return name, f"{gib(device.total)}", f"{gib(host.total)}" if host else "", parts


def _seconds(found: Simulation) -> list[list[str]]:
    rows = []
    for gpu in GPUS:
        for name, seconds in step_seconds(found, gpu).items():
            compute, transfer = seconds["compute"], seconds["transfer"]
            ratio = f"{transfer / compute:.2f}" if compute and transfer else ""
            parts = (f"{seconds[part]:.1f}" for part in ("compute", "memory", "transfer", "host"))
            rows.append([gpu, name, *parts, ratio])
    return rows
