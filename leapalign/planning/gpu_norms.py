"""PyTorch's norm by a root mean square as a GPU computes it: one operation each way, where a CPU runs eight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

_LIBRARY = torch.library.Library("leapalign", "FRAGMENT")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)")


@torch.library.register_fake("leapalign::rms_norm", lib=_LIBRARY)
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("leapalign::rms_norm_backward", lib=_LIBRARY)
def _backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


class _Norm(torch.autograd.Function):
    """Saves what PyTorch's `_fused_rms_norm` does: its arguments, and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = torch.ops.leapalign.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        at_x, at_weight = torch.ops.leapalign.rms_norm_backward(grad, *ctx.saved_tensors)
        return at_x, at_weight, None


@contextlib.contextmanager
def norms_as_on_a_gpu() -> Iterator[None]:
    """Within the block `rms_norm` of fake tensors is one operation, where it is one on a GPU: with a weight of the
    dtype of its input."""
    on_a_cpu = functional.rms_norm

    def norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if weight is None or weight.dtype != x.dtype or len(shape) != 1 or eps is None:
            return on_a_cpu(x, shape, weight, eps)
        result: Tensor = _Norm.apply(x, weight, eps)
        return result

    with patch.object(functional, "rms_norm", norm):
        yield
