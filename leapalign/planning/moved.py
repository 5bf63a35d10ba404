"""Bytes that an operation reads from a device's memory and writes to it: each argument and each result once."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
COUNTED_AS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}
"""Operations that PyTorch has no count of FLOPs for, and those that compute the same."""
_UNREAD = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::uniform_", "aten::normal_")
"""In place, and what was there is not read."""
_ALLOCATIONS = ("aten::empty", "aten::new_empty")
_COPIES_AT_NEED = ("aten::contiguous", "aten::reshape", "aten::to")
"""Views of a tensor that is as it should be."""


class _Kind(NamedTuple):
    moves: bool
    """Whether it computes: a view does not, nor does what only makes room."""
    times: tuple[int, ...]
    """How often each argument is read or written: what changes in place twice."""
    new: tuple[int, ...]
    """Which results are not arguments."""


@cache
def is_product(func: Any) -> bool:
    """Whether ``func`` is a matrix product, a convolution or an attention, whose time its FLOPs decide."""
    packet = func._overloadpacket
    return COUNTED_AS.get(packet, packet) in flop_registry


def bytes_moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that ``func``, an operation of PyTorch or of a library, reads and writes, as a fused kernel would.

    Elements that a stride of zero repeats count once. Views and allocations count nothing. What an operation needs
    for itself in between is not in it.
    """
    kind = _kind(func)
    if not kind.moves:
        return 0
    results = result if isinstance(result, (tuple, list)) else (result,)
    if not func._schema.is_mutable and any(_shares(one, args) for one in results):
        return 0
    total = sum(times * _size(arg) for times, arg in zip(kind.times, args, strict=False))
    if kwargs:
        total += sum(map(_size, kwargs.values()))
    return total + sum(_size(results[place]) for place in kind.new if place < len(results))


@cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    given = [argument.alias_info for argument in schema.arguments]
    made = [returned.alias_info for returned in schema.returns]
    writes = [alias is not None and alias.is_write for alias in given]
    views = bool(made) and not any(writes) and all(alias is not None for alias in made)
    views = views and not schema.name.startswith(_COPIES_AT_NEED)
    twice = 1 if schema.name in _UNREAD else 2
    new = tuple(place for place, alias in enumerate(made) if alias is None or not alias.is_write)
    # A list of tensors is one result of the schema and as many of the call.
    if len(made) == 1 and str(schema.returns[0].type).startswith("List") and made[0] is None:
        new = tuple(range(_MANY))
    makes = any(writes) or any("Tensor" in str(returned.type) for returned in schema.returns)
    moves = makes and not views and not schema.name.startswith(_ALLOCATIONS)
    return _Kind(moves, tuple(twice if write else 1 for write in writes), new)


_MANY = 1000


def _shares(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result lies in memory of the first argument, as `_unsafe_view`'s does."""
    if not (args and isinstance(result, Tensor) and isinstance(args[0], Tensor)):
        return False
    return result.untyped_storage()._cdata == args[0].untyped_storage()._cdata


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        if 0 in value.stride():
            shape = zip(value.shape, value.stride(), strict=True)
            return prod(size for size, stride in shape if stride or not size) * value.element_size()
        return value.nbytes
    return sum(map(_size, value)) if isinstance(value, (tuple, list)) else 0
