"""Constants of a few numbers, for tensors on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def made_there(values: Sequence[float], like: Tensor) -> Tensor:
    """``values`` as ``(len(values),)``, in the dtype and on the device of ``like``, rounded once.

    By a fill for each: a copy from host memory would have the host wait for what the device has to do yet.
    """
    fills = [torch.full((), value, dtype=torch.float64, device=like.device) for value in values]
    return torch.stack(fills).to(like.dtype)
