"""Where a test can have the process die.

What survives a power cut or ``kill -9`` cannot be told from code that is asked politely to stop. Where losing the
process would hurt most, the code calls `point`, which does nothing, unless the environment variable LEAPALIGN_FAULT is
``NAME:COUNT``: then the COUNT-th pass of the point NAME kills its own process with SIGKILL, which nothing can catch.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "LEAPALIGN_FAULT"
_passes: Counter[str] = Counter()


def point(name: str) -> None:
    """Dies here, if the environment asks for it."""
    asked = os.environ.get(VARIABLE)
    if asked is not None:
        _passes[name] += 1
        if asked == f"{name}:{_passes[name]}":
            os.kill(os.getpid(), signal.SIGKILL)
