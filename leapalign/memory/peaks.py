"""How much of a GPU's memory was taken, as PyTorch's allocator counts it."""

from __future__ import annotations

import torch


def peaks_since_last(device: torch.device) -> dict[str, int]:
    """The most bytes since the last call, or the start: ``device_peak_bytes`` of tensors, and
    ``device_reserved_bytes`` that the allocator held for them, gaps included, which is what has to be there. Empty
    where ``device`` is no GPU."""
    if device.type != "cuda":
        return {}
    peaks = {
        "device_peak_bytes": torch.cuda.max_memory_allocated(device),
        "device_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return peaks
