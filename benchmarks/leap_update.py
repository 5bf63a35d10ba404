"""Time `leap_update` with a target, forward and backward: eager PyTorch against the kernel that runs here.

    python benchmarks/leap_update.py [--repeats N]

Prints one JSON object per line: case, variant, milliseconds (quartiles), GB/s counted from the least bytes an
implementation could move, and the largest error against float64 beside them. Variants take turns within each
repeat, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import leap_kernels
import torch
from torch import Tensor

CASES = {"flux-720x720-batch-8": (8, 2025, 64), "video-batch-1": (1, 32760, 64)}
DTYPES = (torch.bfloat16, torch.float32)


def eager(x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Write the connector the way a trainer without leap_kernels would, in float32 arithmetic."""
    xhat = x.float() - delta.view(-1, 1, 1) * velocity.float()
    distance = (target.float() - xhat).detach().abs().mean(dim=(1, 2))
    return (xhat + (target.float() - xhat).detach()).to(x.dtype), distance


def fused(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return `leap_update` on one backend; it raises if the backend cannot run."""

    def run(x: Tensor, velocity: Tensor, delta: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        with leap_kernels.use_backend(backend, strict=True):
            return leap_kernels.leap_update(x, velocity, delta, 0.0, target)

    return run


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the device's work included."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(case: str, dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict[str, object]]:
    """Time forward and backward of every variant on one case."""
    generator = torch.Generator().manual_seed(0)
    x, velocity, target, grad = (torch.randn(CASES[case], generator=generator).to(device, dtype) for _ in range(4))
    x.requires_grad_(), velocity.requires_grad_()
    delta = torch.rand(x.shape[0], generator=generator).to(device)
    exact = (target.double() - (x.double() - delta.double().view(-1, 1, 1) * velocity.double())).abs()
    exact_distance = exact.mean(dim=(1, 2)).detach()

    variants: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {"eager": eager}
    backend = next(e.backend for e in leap_kernels.explain() if e.op == "leap_update")
    if backend != "reference":
        variants[backend] = fused(backend)
    seconds: dict[tuple[str, str], list[float]] = {}
    error = {}
    for repeat in range(repeats + 3):
        for name, variant in variants.items():
            forward = timed(lambda: variant(x, velocity, delta, target), device)  # noqa: B023
            latents, distance = variant(x, velocity, delta, target)
            backward = timed(lambda: torch.autograd.grad(latents, (x, velocity), grad), device)  # noqa: B023
            error[name] = (distance.double() - exact_distance).abs().max().item()
            if repeat >= 3:
                seconds.setdefault((name, "forward"), []).append(forward)
                seconds.setdefault((name, "backward"), []).append(backward)
    # Forward reads x, velocity and target and writes latents; backward reads one gradient and writes one.
    least = {"forward": 4 * x.numel() * x.element_size(), "backward": 2 * x.numel() * x.element_size()}
    return [
        {
            "case": case,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": name,
            "pass": direction,
            "milliseconds": [round(1e3 * q, 4) for q in statistics.quantiles(times, n=4)],
            "gigabytes_per_second": round(least[direction] / statistics.median(times) / 1e9, 2),
            "distance_error": error[name],
        }
        for (name, direction), times in seconds.items()
    ]


def revision() -> str | None:
    """Return the git revision of the sources, or None outside a clone."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def main() -> None:
    """Run every case and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "revision": revision(),
    }
    for case in CASES:
        for dtype in DTYPES:
            for line in measure(case, dtype, device, repeats):
                print(json.dumps({**line, **where}), flush=True)


if __name__ == "__main__":
    main()
