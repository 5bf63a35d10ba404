"""A linear layer of two inputs side by side, which are never joined in memory.

    y = a W_a^T + b W_b^T + bias              W = [W_a, W_b]

Each input is multiplied by the columns of the weight that are its own, and so are the gradients. What `torch.cat` would
copy, forward and back, is not there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._patch_parts import bare


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b, weight)
        of_a, of_b = _columns(weight, a)
        first = torch.nn.functional.linear(a, of_a, bias)
        return torch.addmm(_rows(first), _rows(b), of_b.t()).view(first.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, weight = ctx.saved_tensors
        needs_a, needs_b, needs_weight, needs_bias = ctx.needs_input_grad
        of_a, of_b = _columns(weight, a)
        rows = _rows(grad)
        at_weight = None
        if needs_weight:
            at_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            for part, x in zip(_columns(at_weight, a), (a, b), strict=True):
                torch.mm(rows.t(), _rows(x), out=part)
        return (
            (rows @ of_a).view(a.shape) if needs_a else None,
            (rows @ of_b).view(b.shape) if needs_b else None,
            at_weight,
            rows.sum(dim=0) if needs_bias else None,
        )


def _columns(weight: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    width = a.shape[-1]
    return weight[:, :width], weight[:, width:]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def joined(linear: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return `linear(torch.cat([a, b], dim=-1))` for a (B, S, A) and b (B, S, B), with gradients to all, once.

    A layer that is not PyTorch's own, or has hooks, is called as it is, and so is it where dtypes are mixed and
    under transforms of `torch.func`; a compiler fuses the copy by itself.
    """
    if _plain(linear, a, b):
        result: Tensor = _Joined.apply(a, b, linear.weight, linear.bias)
        return result
    whole: Tensor = linear(torch.cat([a, b], dim=-1))
    return whole


def _autocast(device: str) -> bool:
    # Of some devices, as of meta, PyTorch would not answer.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _plain(linear: Any, a: Tensor, b: Tensor) -> bool:
    return (
        type(linear) is nn.Linear
        and bare(linear)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and a.dtype == b.dtype == linear.weight.dtype
        and not _autocast(a.device.type)
        and not hasattr(linear.weight, "placements")  # Spread over processes, as DTensor is.
    )
