"""Random streams: every number drawn in a run is a function of its seed, a stream and a position."""

from __future__ import annotations

import numpy as np

NOISE_STREAM, INDEX_STREAM, CONTROL_STREAM, EVALUATION_STREAM, ROUNDING_STREAM, AVERAGE_STREAM, ADAPTER_STREAM = range(
    1, 8
)


def seed_of(seed: int, stream: int, position: int) -> int:
    """An independent 63-bit seed for each stream and position of a run: nothing random needs saving."""
    return int(np.random.SeedSequence([seed, stream, position]).generate_state(1, np.uint64)[0] >> 1)
