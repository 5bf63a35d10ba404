"""Launchers of the ops of transformer blocks: their tensors are as wide as the size of a sample allows."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from .._adaln_catalog import ROW, WIDE_ROW
from .._adaln_wide import wide_backward, wide_forward
from .._block_catalog import HEAD
from .._group_norm_launch import CHANNELS
from .._group_norm_launch import triton_backward as group_norm_backward
from .._group_norm_launch import triton_forward as group_norm
from .._norm_rope import Rotation
from .._norm_rope_triton import triton_backward as norm_rope_backward
from .._norm_rope_triton import triton_forward as norm_rope
from ..adaln_modulate import triton_backward as modulate_backward
from ..adaln_modulate import triton_forward as modulate
from ..gated_residual import triton_backward as gated_backward
from ..gated_residual import triton_forward as gated
from ..gelu_tanh import triton_backward as gelu_backward
from ..gelu_tanh import triton_forward as gelu
from ..swiglu import triton_backward as swiglu_backward
from ..swiglu import triton_forward as swiglu
from .launches import Inputs, Launcher

_HEADS = 24
_FIRST_CHANNELS = 17
_FLOAT32 = torch.float32


def _call(launcher: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: launcher(*arguments)


def _rows(i: Inputs, count: int, widest: int = ROW) -> list[Tensor]:
    """Return tensors (B, rows, width)."""
    width = gcd(i.per_sample, widest)
    return [i.tensor((i.batch, i.per_sample // width, width), i.dtype) for _ in range(count)]


def _vectors(i: Inputs, count: int, dtype: torch.dtype | None, widest: int = ROW) -> list[Tensor]:
    """Return chunks of a tensor (B, 6 * width)."""
    width = gcd(i.per_sample, widest)
    return list(i.tensor((i.batch, 6 * width), dtype or i.dtype).chunk(6, dim=-1)[:count])


def _modulate(shift: bool = True, dtype: torch.dtype | None = None) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        scale, other = _vectors(i, 2, dtype)
        return _call(modulate, *_rows(i, 1), other if shift else None, scale, 1e-6)

    return launcher


def _modulate_backward(sums: bool, dtype: torch.dtype | None = None) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        grad, x = _rows(i, 2)
        (scale,) = _vectors(i, 1, dtype)
        return _call(modulate_backward, grad, x, scale, _statistics(i, x), scale.dtype, sums)

    return launcher


def _wide(i: Inputs) -> Callable[[], object]:
    (x,) = _rows(i, 1, WIDE_ROW)
    shift, scale = _vectors(i, 2, None, WIDE_ROW)
    return _call(wide_forward, x, shift, scale, 1e-6, i.tensor(x.shape, i.dtype), _statistics(i, x))


def _wide_backward(sums: bool) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        grad, x = _rows(i, 2, WIDE_ROW)
        return _call(wide_backward, grad, x, *_vectors(i, 1, None, WIDE_ROW), _statistics(i, x), sums)

    return launcher


def _statistics(i: Inputs, x: Tensor) -> Tensor:
    return i.tensor((2, *x.shape[:-1]), _FLOAT32)


def _gated(dtype: torch.dtype | None = None) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        x, y = _rows(i, 2)
        return _call(gated, x, *_vectors(i, 1, dtype), y)

    return launcher


def _gated_backward(of_gate: bool, of_y: bool, dtype: torch.dtype | None = None) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        grad, y = _rows(i, 2)
        (gate,) = _vectors(i, 1, dtype)
        return _call(gated_backward, grad, gate, y if of_gate else None, i.dtype if of_y else None)

    return launcher


def _swiglu(packed: bool) -> Launcher:
    return lambda i: _call(swiglu, *_halves(i, packed))


def _swiglu_backward(packed: bool) -> Launcher:
    return lambda i: _call(swiglu_backward, _long_rows(i), *_halves(i, packed))


def _long_rows(i: Inputs, times: int = 1) -> Tensor:
    """Return a tensor (B, rows, width), of one row a sample where its size allows no other: programs take one each."""
    width = gcd(i.per_sample, ROW)
    width = i.per_sample if width == 1 else width
    return i.tensor((i.batch, i.per_sample // width, times * width), i.dtype)


def _halves(i: Inputs, packed: bool) -> tuple[Tensor, Tensor | None]:
    return (_long_rows(i, 2), None) if packed else (_long_rows(i), _long_rows(i))


def _heads(i: Inputs, rope: bool, halves: bool) -> tuple[Tensor, Tensor, Rotation]:
    """Return queries (B, S, H, D), the weight of their norm, and tables where pairs are turned."""
    # Only pairs can be turned.
    width = max(2 if rope else 1, gcd(i.per_sample, HEAD))
    count = max(1, i.per_sample // width)
    # A program takes heads of one token.
    heads = gcd(count, _HEADS)
    heads = count if heads == 1 else heads
    tokens = count // heads
    tables = [i.tensor((tokens, width // 2), _FLOAT32) if rope else None for _ in range(2)]
    x = i.tensor((i.batch, tokens, heads, width), i.dtype)
    return x, i.tensor((width,), _FLOAT32), Rotation(tables[0], tables[1], 1e-6, halves)


def _norm_rope(rope: bool, halves: bool) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        heads = _heads(i, rope, halves)
        return _call(norm_rope, *heads, i.tensor(heads[0].shape, i.dtype))

    return launcher


def _norm_rope_backward(weight: bool, halves: bool) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        heads = _heads(i, True, halves)
        return _call(norm_rope_backward, i.tensor(heads[0].shape, i.dtype), *heads, weight)

    return launcher


def _images(i: Inputs, count: int, last: bool) -> list[Tensor]:
    """Return tensors (B, C, places, 1)."""
    channels = gcd(i.per_sample, CHANNELS if last else _FIRST_CHANNELS)
    places = i.per_sample // channels
    if last:
        return [i.tensor((i.batch, places, channels), i.dtype).mT.unsqueeze(-1) for _ in range(count)]
    return [i.tensor((i.batch, channels, places, 1), i.dtype) for _ in range(count)]


def _group_norm(last: bool) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        (x,) = _images(i, 1, last)
        weight, bias = (i.tensor(x.shape[1:2], _FLOAT32) for _ in range(2))
        return _call(group_norm, x, x.shape[1], weight, bias, 1e-6, last)

    return launcher


def _group_norm_backward(last: bool) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        grad, x = _images(i, 2, last)
        mean, rstd = (i.tensor(x.shape[:2], _FLOAT32) for _ in range(2))
        weight, bias = (i.tensor(x.shape[1:2], _FLOAT32) for _ in range(2))
        return _call(group_norm_backward, grad, x, mean, rstd, weight, bias, last)

    return launcher


BLOCK_LAUNCHERS: dict[str, Launcher] = {
    "adaln_modulate": _modulate(),
    "adaln_modulate/no_shift": _modulate(shift=False),
    "adaln_modulate/float32_vectors": _modulate(dtype=_FLOAT32),
    "adaln_modulate/backward": _modulate_backward(False),
    "adaln_modulate/backward_sums": _modulate_backward(True),
    "adaln_modulate/backward_float32_vectors": _modulate_backward(True, _FLOAT32),
    "adaln_modulate/wide": _wide,
    "adaln_modulate/wide_row_sums": _wide_backward(False),
    "adaln_modulate/wide_backward": _wide_backward(False),
    "adaln_modulate/wide_backward_sums": _wide_backward(True),
    "gated_residual": _gated(),
    "gated_residual/float32_gate": _gated(_FLOAT32),
    "gated_residual/backward": _gated_backward(True, True),
    "gated_residual/backward_of_gate": _gated_backward(True, False),
    "gated_residual/backward_of_y": _gated_backward(False, True),
    "gated_residual/backward_float32_gate": _gated_backward(True, True, _FLOAT32),
    "gelu_tanh": lambda i: _call(gelu, i.flat()),
    "gelu_tanh/backward": lambda i: _call(gelu_backward, i.flat(), i.flat(), False),
    "gelu_tanh/backward_and_again": lambda i: _call(gelu_backward, i.flat(), i.flat(), True),
    "swiglu": _swiglu(packed=False),
    "swiglu/packed": _swiglu(packed=True),
    "swiglu/backward": _swiglu_backward(packed=False),
    "swiglu/packed_backward": _swiglu_backward(packed=True),
    "qk_norm_rope": _norm_rope(True, False),
    "qk_norm_rope/halves": _norm_rope(True, True),
    "qk_norm_rope/norm_only": _norm_rope(False, False),
    "qk_norm_rope/backward": _norm_rope_backward(True, False),
    "qk_norm_rope/backward_halves": _norm_rope_backward(True, True),
    "qk_norm_rope/backward_frozen": _norm_rope_backward(False, False),
    **{
        f"group_norm_silu/{name}{'_channels_last' if last else ''}": launcher(last)
        for names, launcher in (
            (("moments", "group_moments", "silu"), _group_norm),
            (("gradient_sums", "group_gradients", "gradient"), _group_norm_backward),
        )
        for name in names
        for last in (False, True)
        if not (last and name.startswith("group_"))
    },
}
"""By the name of the kernel in the catalog."""
