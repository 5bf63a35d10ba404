"""What host work costs where leap_kernels has no native library: told, or refused, before training."""

from __future__ import annotations

import logging
import os

import leap_kernels

from leapalign.config import MemoryConfig
from leapalign.inputs.validation import UserError

AVERAGE_SLOWER, STEP_SLOWER = 14, 190
"""How many times as long the reference takes for a weight average and a step of adamw_8bit: measured by
``benchmarks/without_native.py --threads 1`` on 16.8 million weights in bfloat16."""
REMEDY = (
    "install leapalign again where there are a C++ compiler and Python's headers, and `leapalign doctor` tells whether "
    "it worked"
)

_log = logging.getLogger("leapalign")


def require_speed(config: MemoryConfig) -> None:
    """Warns where the host's work is done by the reference.

    Raises UserError where that is an optimizer's step, unless ``LEAP_KERNELS=reference`` asks for it.
    """
    (average,) = (e for e in leap_kernels.explain() if (e.op, e.device) == ("ema_update_", "cpu"))
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
