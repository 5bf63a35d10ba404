"""What it costs where leap_kernels has no native library, or no Triton: told, or refused, before training."""

from __future__ import annotations

import logging
import os

import leap_kernels
import torch

from leapalign.config import KernelsConfig, MemoryConfig
from leapalign.inputs.validation import UserError

AVERAGE_SLOWER, STEP_SLOWER = 14, 190
"""How many times as long the reference takes for a weight average and a step of adamw_8bit: measured by
``benchmarks/without_native.py --threads 1`` on 16.8 million weights in bfloat16."""
PATCHED_SLOWER = 1.3
"""How many times as long an iteration of the tiny model takes that is patched to the reference: measured on a CPU by
``LEAP_KERNELS=reference python benchmarks/patched_iteration.py``."""
REMEDY = (
    "install leapalign again where there are a C++ compiler and Python's headers, and `leapalign doctor` tells whether "
    "it worked"
)

_log = logging.getLogger("leapalign")


def require_speed(config: MemoryConfig) -> None:
    """Warns where the host's work is done by the reference.

    Raises UserError where that is an optimizer's step, unless ``LEAP_KERNELS=reference`` asks for it.
    """
    average = _choice("ema_update_", "cpu")
    if average.backend != "reference":
        return
    if config.optimizer == "host" and os.environ.get("LEAP_KERNELS") != "reference":
        raise UserError(
            f"memory.optimizer host without native code would take about {STEP_SLOWER} times as long for a step of "
            f"adamw_8bit ({average.reason}); {REMEDY}, or set LEAP_KERNELS=reference in the environment to train so"
        )
    step = f", and a step of adamw_8bit about {STEP_SLOWER} times" if config.optimizer == "host" else ""
    _log.warning(
        "without native code the weight average, in host memory, takes about %d times as long%s (%s); %s",
        AVERAGE_SLOWER,
        step,
        average.reason,
        REMEDY,
    )


def warn_of_patch(config: KernelsConfig, device: torch.device) -> None:
    """Warns where ``kernels.patch`` would have the model compute with the reference on ``device``."""
    choice = _choice("adaln_modulate", device.type)
    if config.patch and choice.backend == "reference":
        _log.warning(
            "kernels.patch computes with plain PyTorch here (%s): on a CPU an iteration takes about %.1f times as long "
            "as without it; set kernels.patch to false, or %s",
            choice.reason,
            PATCHED_SLOWER,
            REMEDY if device.type == "cpu" else "install triton",
        )


def _choice(op: str, device: str) -> leap_kernels.Explanation:
    return next(one for one in leap_kernels.explain() if (one.op, one.device) == (op, device))
