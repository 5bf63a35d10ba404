"""What patched modules have in common: the ops where they fit the tensors and norms at hand, else plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._patch_rules import Forward
from .adaln_modulate import adaln_modulate
from .gated_residual import gated_residual


def bare(module: Any) -> bool:
    """Say whether calling a module would do no more than its class's `forward`: no hooks, and nothing put in its place
    but by `patch`."""
    return isinstance(module.__dict__.get("forward"), Forward | None) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain_layer_norm(norm: Any) -> bool:
    """Say whether a norm is a layer norm over the last dimension without weights, which `adaln_modulate` is."""
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine and len(norm.normalized_shape) == 1 and bare(norm)


def unless_plain(*names: str) -> Any:
    """Return a predicate that says which of the norms of these names, where there are any, is no plain layer norm."""

    def unsuitable(module: Any) -> str | None:
        for name in names:
            norm = getattr(module, name)
            if norm is not None and not plain_layer_norm(norm):
                return f"its {name} is no layer norm without weights and hooks"
        return None

    return unsuitable


def _vector_of(x: Tensor, vector: Tensor) -> bool:
    """Say whether `vector` has a row for each sample of x (B, ..., C), and only that."""
    return vector.shape[0] == x.shape[0] and vector.numel() == x.shape[0] * x.shape[-1] > 0 and x.numel() > 0


def _wide(x: Tensor, *others: Tensor) -> Tensor:
    """Return `x` in the dtype of a result that PyTorch would promote."""
    dtype = x.dtype
    for other in others:
        if other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    return x if dtype == x.dtype else x.to(dtype)


def fits_op(norm: Any, x: Tensor, shift: Tensor | None, scale: Tensor) -> bool:
    """Say whether `adaln_modulate` is what a norm and these vectors compute, but for the dtype of the result."""
    return plain_layer_norm(norm) and _vector_of(x, scale) and (shift is None or shift.shape == scale.shape)


def modulated(norm: Any, x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """Return `norm(x) * (1 + scale) + shift` for x (B, S, C) and vectors (B, C), (B, 1, C) or any that broadcast."""
    if fits_op(norm, x, shift, scale):
        return adaln_modulate(_wide(x, scale, scale if shift is None else shift), shift, scale, norm.eps)
    normal = norm(x) * (1 + _of_tokens(scale))
    return normal if shift is None else normal + _of_tokens(shift)


def with_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Return `x + gate * y` for x and y (B, S, C) and a gate (B, C), (B, 1, C) or any that broadcasts."""
    if _vector_of(x, gate) and x.shape == y.shape:
        return gated_residual(_wide(x, gate, y), gate, y)
    return x + _of_tokens(gate) * y


def _of_tokens(vector: Tensor) -> Tensor:
    return vector.unsqueeze(1) if vector.ndim == 2 else vector


def empty(x: Tensor | None) -> bool:
    """Say whether there are tokens (B, S, C) of which there are none, as of no text: no op takes such."""
    return x is not None and x.numel() == 0


def within_half(x: Tensor) -> Tensor:
    """Return `x`, in float16 without infinities, as diffusers' blocks do."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def own_forward(module: Any, *arguments: Any, **options: Any) -> Any:
    """Call what was replaced: the class's `forward`."""
    return type(module).forward(module, *arguments, **options)
