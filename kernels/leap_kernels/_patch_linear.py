"""Linear layers that make what they need for gradients again, or share it, where PyTorch's own would save and copy.

    y   = a W_a^T + gelu(x) W_x^T + bias                    W = [W_a, W_x]; without a, W = W_x
    y   = adaln_modulate(x, shift, scale) W^T + bias
    y_i = x W_i^T + bias_i

The gradient of a weight takes the layer's input. An activation, or a norm, is made again from what its own gradient is
made of. Two inputs side by side are never joined in memory: each is multiplied by the columns of the weight that are
its own. And the gradients that several layers have for one input are added up by their products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ._dispatch import current, resumed
from ._patch_parts import bare, fits_op, modulated
from .adaln_modulate import gradients as modulate_gradients
from .adaln_modulate import modulate
from .gelu_tanh import gelu_tanh
from .gelu_tanh import gradient as gelu_gradient


class _OfGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, x, weight)
        ctx.setting = current()
        active = gelu_tanh(x)
        if a is None:
            return functional.linear(active, weight, bias)
        of_a, of_x = _columns(weight, a)
        out = functional.linear(a, of_a, bias)
        _add_product(_rows(out), _rows(active), of_x.t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, x, weight = ctx.saved_tensors
        needs_a, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = _rows(grad)
        of_a, of_x = _columns(weight, a)
        at_x = active = at_weight = None
        if needs_x:
            at_active = (rows @ of_x).view(x.shape)
            at_x, active = resumed(ctx.setting, gelu_gradient, at_active, x, needs_weight)
            del at_active
        elif needs_weight:
            active = resumed(ctx.setting, gelu_tanh, x)
        if needs_weight:
            at_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            for part, given in zip(_columns(at_weight, a), (a, active), strict=True):
                if given is not None:
                    torch.mm(rows.t(), _rows(given), out=part)
        return (
            (rows @ of_a).view(a.shape) if needs_a else None,
            at_x,
            at_weight,
            rows.sum(dim=0) if needs_bias else None,
        )


class _OfModulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        y, statistics = modulate(x, shift, scale, eps)
        ctx.save_for_backward(x, shift, scale, statistics, weight)
        ctx.eps, ctx.setting = eps, current()
        return functional.linear(y, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, statistics, weight = ctx.saved_tensors
        needs_x, needs_shift, needs_scale, _, needs_weight, needs_bias = ctx.needs_input_grad
        rows = _rows(grad)
        at_x = at_shift = at_scale = at_weight = None
        if needs_x or needs_shift or needs_scale:
            at_y = (rows @ weight).view(x.shape)
            sums = needs_shift or needs_scale
            at_x, at_shift, at_scale = resumed(
                ctx.setting, modulate_gradients, at_y, x, scale, statistics, shift.dtype, sums
            )
            del at_y
        if needs_weight:
            y, _ = resumed(ctx.setting, modulate, x, shift, scale, ctx.eps)
            at_weight = rows.t() @ _rows(y)
        return (
            at_x if needs_x else None,
            at_shift if needs_shift else None,
            at_scale if needs_scale else None,
            None,
            at_weight,
            rows.sum(dim=0) if needs_bias else None,
        )


class _Several(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights_and_biases: Tensor | None) -> tuple[Tensor, ...]:
        count = len(weights_and_biases) // 2
        weights: Any = weights_and_biases[:count]
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        biases = weights_and_biases[count:]
        return tuple(functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, *needed = ctx.needs_input_grad
        rows = [None if grad is None else _rows(grad) for grad in grads]
        at_x: Tensor | None = None
        for given, weight in zip(rows, weights, strict=True):
            if needs_x and given is not None:
                at_x = given @ weight if at_x is None else _add_product(at_x, given, weight)
        of_x = _rows(x)
        at_weights = [
            given.t() @ of_x if needs and given is not None else None
            for given, needs in zip(rows, needed[: len(rows)], strict=True)
        ]
        at_biases = [
            given.sum(dim=0) if needs and given is not None else None
            for given, needs in zip(rows, needed[len(rows) :], strict=True)
        ]
        return None if at_x is None else at_x.view(x.shape), *at_weights, *at_biases


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # As one operation: `addmm_` would be another, whose work counters of FLOPs do not know.
    return torch.addmm(total, a, b, out=total)


def _columns(weight: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor]:
    width = 0 if a is None else a.shape[-1]
    return weight[:, :width], weight[:, width:]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def of_gelu(linear: Any, x: Tensor, beside: Tensor | None = None) -> Tensor:
    """Return `linear(gelu_tanh(x))` for x (B, S, C), or with a tensor `beside` (B, S, A), which comes first, joined.

    Gradients reach all, once. A layer that is not PyTorch's own, or has hooks, is called as it is, and so is it where
    dtypes are mixed, under transforms of `torch.func`, and by a compiler, which decides by itself what to save.
    """
    if _plain(linear, x) and (beside is None or beside.dtype == x.dtype):
        result: Tensor = _OfGelu.apply(beside, x, linear.weight, linear.bias)
        return result
    active = gelu_tanh(x)
    whole: Tensor = linear(active if beside is None else torch.cat([beside, active], dim=-1))
    return whole


def of_modulated(linear: Any, norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `linear(modulated(norm, x, shift, scale))`, with gradients to all, once; layers as for `of_gelu`."""
    if _plain(linear, x) and shift.dtype == scale.dtype == x.dtype and fits_op(norm, x, shift, scale):
        result: Tensor = _OfModulated.apply(x, shift, scale, norm.eps, linear.weight, linear.bias)
        return result
    whole: Tensor = linear(modulated(norm, x, shift, scale))
    return whole


def several(x: Tensor, *linears: Any) -> Sequence[Tensor]:
    """Return `[linear(x) for linear in linears]`, x (B, S, C), with gradients to all, once; layers as for `of_gelu`."""
    if torch.is_grad_enabled() and all(_plain(linear, x) for linear in linears):
        parameters = [linear.weight for linear in linears] + [linear.bias for linear in linears]
        results: tuple[Tensor, ...] = _Several.apply(x, *parameters)
        return results
    return [linear(x) for linear in linears]


def _autocast(device: str) -> bool:
    # Of some devices, as of meta, PyTorch would not answer.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _plain(linear: Any, x: Tensor) -> bool:
    return (
        type(linear) is nn.Linear
        and bare(linear)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and x.dtype == linear.weight.dtype
        and not _autocast(x.device.type)
        and not hasattr(linear.weight, "placements")  # Spread over processes, as DTensor is.
    )
