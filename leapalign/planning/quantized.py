"""bitsandbytes' weights of four bits in a simulation: made of fake tensors, and widened where a ledger sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def made_of_fakes() -> Iterator[None]:
    """Within the block `leapalign.models.quantize_blocks` takes layers of fake tensors.

    What else it makes is real, but for what follows from these: tables, some of which bitsandbytes keeps.
    """
    with patch.object(import_module("bitsandbytes.nn"), "Params4bit", _Unpacked):
        yield


class _Unpacked:
    """Stands in for ``Params4bit``, whose class no fake tensor can be of: makes a parameter with what a product asks
    of it."""

    def __init__(self, data: Tensor, blocksize: int, quant_type: str, module: nn.Module) -> None:
        self._data, self._options = data, {"blocksize": blocksize, "quant_type": quant_type}

    def to(self, device: torch.device) -> nn.Parameter:
        library: Any = import_module("bitsandbytes.functional")
        packed, state = library.quantize_4bit(self._data.to(device), compress_statistics=True, **self._options)
        parameter = nn.Parameter(packed, requires_grad=False)
        parameter.quant_state = state  # type: ignore[attr-defined]
        return parameter


def is_product(func: Any) -> bool:
    """Whether ``func`` is bitsandbytes' product with weights of four bits, which is one operation."""
    return func.namespace == "bitsandbytes" and func._opname == "gemm_4bit"


def product(
    x: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    scales: Tensor,
    blocksize: int,
    kind: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """That operation as its parts, as it works inside for many rows of ``x``: the whole matrix is widened first."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        scales = ops.dequantize_blockwise(absmax_8bit, scales, absmax_code, 256, torch.float32) + absmax_offset
    widened = ops.dequantize_4bit(weight, scales, blocksize, kind, shape, x.dtype).t()
    rows = x.reshape(-1, x.shape[-1])
    out = rows.mm(widened) if bias is None else torch.addmm(bias, rows, widened)
    return out.view(*x.shape[:-1], -1)
