"""The arithmetic of `qk_norm_rope` on one tensor of queries or keys: the reference, and native CPU code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._arguments import compute_dtype


class Rotation(NamedTuple):
    """What turns the pairs, and what the norm adds to the mean square."""

    cos: Tensor | None
    """(S, D/2) or (B, S, D/2), None for no rotation; `sin` likewise."""
    sin: Tensor | None
    eps: float
    halves: bool

    def part(self, first: int, end: int) -> Rotation:
        """Return the same for tokens `first` to `end`."""
        if self.cos is None or self.sin is None or (first == 0 and end == self.cos.shape[-2]):
            return self
        return self._replace(cos=self.cos[..., first:end, :], sin=self.sin[..., first:end, :])

    def tables(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, int]:
        """Return the tables, contiguous and in `dtype`, and the elements from one of their samples to the next."""
        if self.cos is None or self.sin is None:
            return None, None, 0
        cos, sin = (
            table if table.dtype is dtype and table.is_contiguous() else table.to(dtype).contiguous()
            for table in (self.cos, self.sin)
        )
        return cos, sin, cos.stride(0) if cos.ndim == 3 else 0


def neighbours(x: Tensor) -> Tensor:
    """Return x (B, S, H, D), copied where the elements of a head are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_float(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.to(torch.float32).contiguous()


# ---- reference ---------------------------------------------------------------------------------------------


def _rotated(x: Tensor, rotation: Rotation, backwards: bool = False) -> Tensor:
    """Turn the pairs of x (B, S, H, D), of the dtype of the arithmetic."""
    if rotation.cos is None or rotation.sin is None:
        return x
    # One more dimension, for the heads.
    cos, sin = (table.to(x.dtype).unsqueeze(-2) for table in (rotation.cos, rotation.sin))
    sin = -sin if backwards else sin
    a, b = x.unflatten(-1, (2, -1)).unbind(-2) if rotation.halves else x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-2 if rotation.halves else -1).flatten(-2)


def reference_forward(x: Tensor, weight: Tensor | None, rotation: Rotation, out: Tensor) -> None:
    """Compute queries or keys in plain PyTorch: from `x` (B, S, H, D) into `out`, of the same shape and dtype."""
    values = x.to(compute_dtype(x))
    normed = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + rotation.eps)
    out.copy_(_rotated(normed if weight is None else normed * weight.to(values.dtype), rotation))


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rotation: Rotation, weight_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient at x, contiguous and in its dtype, and that at the weight where it is wanted."""
    values = x.to(compute_dtype(x))
    rstd = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + rotation.eps)
    at_norm = _rotated(grad.to(values.dtype), rotation, backwards=True)
    weighted = at_norm if weight is None else at_norm * weight.to(values.dtype)
    mean = (weighted * values).mean(dim=-1, keepdim=True)
    at_x = (rstd * (weighted - values * rstd.square() * mean)).to(x.dtype).contiguous()
    if weight is None or not weight_wanted:
        return at_x, None
    return at_x, (at_norm * values * rstd).sum(dim=(0, 1, 2)).to(weight.dtype)


# ---- native CPU code ---------------------------------------------------------------------------------------

WIDEST = 512
"""Elements of the widest head that the native code has room for."""


def native_forward(x: Tensor, weight: Tensor | None, rotation: Rotation, out: Tensor) -> None:
    """Compute queries or keys with native/norm_rope.cpp; arguments as for `reference_forward`."""
    x, weight = neighbours(x), as_float(weight)
    cos, sin, table_batch = rotation.tables(torch.float32)
    _native.call(
        "leap_norm_rope",
        *(x, weight, cos, sin, out, *x.stride()[:3], *out.stride()[:2], table_batch, *x.shape),
        *(rotation.eps, rotation.halves, x.dtype),
    )


def native_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rotation: Rotation, weight_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients with native/norm_rope.cpp; arguments as for `reference_backward`."""
    grad, x, factors = neighbours(grad), neighbours(x), as_float(weight)
    cos, sin, table_batch = rotation.tables(torch.float32)
    out = x.new_empty(x.shape)
    at_weight = torch.empty_like(factors) if factors is not None and weight_wanted else None
    _native.call(
        "leap_norm_rope_backward",
        *(grad, x, factors, cos, sin, out, at_weight),
        *(*grad.stride()[:3], *x.stride()[:3], table_batch, *x.shape),
        *(rotation.eps, rotation.halves, x.dtype),
    )
    return out, at_weight.to(weight.dtype) if at_weight is not None and weight is not None else None
