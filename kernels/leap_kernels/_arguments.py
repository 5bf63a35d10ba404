"""What the ops accept: latents, per-sample scalars, and the dtype that arithmetic on them runs in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_EXACT = (torch.float32, torch.float64)

PerSample = float | Tensor
"""A value per sample: a Python number, a 0-d tensor, or a tensor of shape (B,)."""


def check_latents(op: str, **tensors: Tensor | None) -> None:
    """Check that tensors (the first, and of the others those given) are latents (B, ...) of one shape on one device.

    Raises:
        ValueError: on a dtype other than float32, bfloat16, float16 and float64, on a missing or empty
            batch, and where shape or device differ from those of the first.
    """
    first_name, first = next(iter(tensors.items()))
    assert first is not None
    if first.ndim == 0 or first.numel() == 0:
        raise ValueError(
            f"{op} needs latents of shape (B, ...) with at least one element, but {first_name} has shape "
            f"{tuple(first.shape)}."
        )
    shape, device = first.shape, first.device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{op} takes float32, bfloat16, float16 and float64, but {name} is {_name(tensor.dtype)}.")
        if tensor is first:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{op} needs tensors of one shape, but {first_name} has {tuple(first.shape)} and "
                f"{name} has {tuple(tensor.shape)}."
            )
        if tensor.device != device:
            raise ValueError(
                f"{op} needs tensors on one device, but {first_name} is on {first.device} and {name} is on "
                f"{tensor.device}."
            )


def check_writable(op: str, to_name: str, to: Tensor, source_name: str, source: Tensor) -> None:
    """Check that `to` can take a result of the shape of `source` in place.

    Raises:
        ValueError: where shape or device differ, or elements of `to` share memory.
    """
    if to.shape != source.shape or to.device != source.device:
        raise ValueError(
            f"{op} needs {to_name} and {source_name} alike, but {to_name} is {tuple(to.shape)} on {to.device} and "
            f"{source_name} {tuple(source.shape)} on {source.device}."
        )
    if 0 in to.stride() and any(not stride and size > 1 for stride, size in zip(to.stride(), to.shape, strict=True)):
        raise ValueError(f"{op} cannot write to an expanded {to_name}: its elements share memory.")


def check_apart(op: str, a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    """Check that two tensors without gaps share no memory; of others it would be hard to tell.

    Raises:
        ValueError: where they do.
    """
    if is_compiling() or a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return
    first, other = a.storage_offset() * a.itemsize, b.storage_offset() * b.itemsize
    apart = first >= other + b.nbytes or other >= first + a.nbytes
    if not apart and a.is_contiguous() and b.is_contiguous():
        raise ValueError(f"{op} needs {a_name} and {b_name} in memory of their own: copy {b_name} before.")


def put_back(whole: Tensor, to: Tensor) -> None:
    """Copy to a tensor what was computed in place in `to.contiguous()`, unless that is the tensor itself."""
    if whole.data_ptr() != to.data_ptr():
        to.copy_(whole)


def check_draws(op: str, seed: int, offset: int, count: int) -> None:
    """Check that `count` elements, from position `offset` on, have random bits under `seed`.

    Raises:
        ValueError: if a number is out of range.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"{op} needs a seed in [0, 2^64), not {seed}.")
    if not 0 <= offset <= (1 << 63) - max(1, count):
        raise ValueError(f"{op} needs an offset in [0, 2^63 - elements], not {offset}.")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 if any tensor is float64, else float32."""
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def per_sample(op: str, name: str, value: PerSample, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value` as a detached, contiguous tensor (B,) of `dtype` on the device of `like` (B, ...).

    Raises:
        ValueError: if `value` is a tensor of another shape than () or (B,).
    """
    if not isinstance(value, Tensor):
        return torch.full((like.shape[0],), float(value), dtype=dtype, device=like.device)
    _check_per_sample(op, name, value, like.shape[0])
    return _of_each_sample(value, like, dtype)


def _of_each_sample(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if value.requires_grad:
        value = value.detach()
    if value.dtype is not dtype or value.device != like.device:
        value = value.to(device=like.device, dtype=dtype)
    return (value if value.ndim == 1 else value.expand(like.shape[0])).contiguous()


def sigma_difference(
    op: str, names: tuple[str, str], first: PerSample, second: PerSample, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return `first - second` per sample, subtracted before any rounding to `dtype`: a tensor (B,).

    Two Python numbers subtract in double precision; half-precision tensors are widened first.

    Raises:
        ValueError: if a value is a tensor of another shape than () or (B,).
    """
    difference = _exact(op, names[0], first, like) - _exact(op, names[1], second, like)
    if not isinstance(difference, Tensor):
        return torch.full((like.shape[0],), difference, dtype=dtype, device=like.device)
    return _of_each_sample(difference, like, dtype)


def _exact(op: str, name: str, value: PerSample, like: Tensor) -> PerSample:
    """Return a checked value, a tensor being on the device of `like` and in float32 or float64."""
    if not isinstance(value, Tensor):
        return value
    _check_per_sample(op, name, value, like.shape[0])
    if value.dtype in _EXACT and value.device == like.device:
        return value
    return value.to(like.device, torch.float64 if value.dtype == torch.float64 else torch.float32)


def expand(value: Tensor, like: Tensor) -> Tensor:
    """View a per-sample tensor (B,) as (B, 1, ...), to broadcast against `like` (B, ...)."""
    return value.view(-1, *[1] * (like.ndim - 1))


def size(x: Tensor) -> tuple[int, int]:
    """Return the batch and the elements of a sample of latents (B, ...)."""
    return x.shape[0], x.numel() // x.shape[0]


def rows(values: Tensor) -> Tensor:
    """Reshape (B, ...) to (B, elements of a sample); (B,) becomes (B, 1)."""
    return values.reshape(values.shape[0], -1)


def _check_per_sample(op: str, name: str, value: Tensor, batch: int) -> None:
    if value.ndim and value.shape != (batch,):
        raise ValueError(
            f"{op} needs {name} to be a number or a tensor of shape () or ({batch},), not {tuple(value.shape)}."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
