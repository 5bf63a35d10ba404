"""What this machine offers: versions, devices, and which backend each kernel would use, and why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from typing import Any

import leap_kernels
import torch

from leapalign.reports.pages import text_table

PACKAGES = ("torch", "triton", "diffusers", "transformers", "bitsandbytes", "flash-attn", "liger-kernel", "xformers")


def diagnose() -> dict[str, Any]:
    """``versions``, ``devices`` and ``kernels`` (op, device, backend, reason), fit for JSON."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "kernels": [dataclasses.asdict(item) for item in leap_kernels.explain()],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def explanation(report: dict[str, Any]) -> str:
    """``report`` for a person."""
    versions = [[name, version or "not installed"] for name, version in report["versions"].items()]
    kernels = [[item["op"], item["device"], item["backend"], item["reason"]] for item in report["kernels"]]
    return "\n\n".join(
        (
            f"Python {report['python']}, devices: {', '.join(report['devices'])}",
            text_table(("package", "version"), versions),
            text_table(("kernel", "for tensors on", "backend", "because"), kernels),
        )
    )
