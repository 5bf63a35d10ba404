"""One launch for many tensors: a table with a row for each, and for each program the row that it works on.

A row is made of 64-bit words: its first program, how many it has, the elements of its tensors, their addresses, and
then the numbers of the op. A launch needs the table alone: nothing in it comes from the host, so that a CUDA graph may
hold it. On the way there are one copy to the device, which does not wait, and a few small kernels of PyTorch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ._triton import jit, tl

ADDRESSES = 3
"""The word of the first address."""
_ALIGNMENT = 16

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Table:
    """What the programs of a launch look up, on the device."""

    rows: Tensor
    """int64 (tensors, words)."""
    row_of: Tensor
    """int32 (programs,)."""


def table(rows: Sequence[Sequence[Tensor]], block: int, numbers: Tensor | None = None) -> Table:
    """Return the table of rows of contiguous tensors, where a program takes `block` elements of each tensor of its row.

    Args:
        rows: for each row its tensors; the first one's elements count, of which there is at least one.
        numbers: int64 (rows, words) on the CPU: further words.
    """
    device, programs, words = rows[0][0].device, 0, []
    for tensors in rows:
        count = tensors[0].numel()
        blocks = -(-count // block)
        words.append((programs, blocks, count, *(tensor.data_ptr() for tensor in tensors)))
        programs += blocks
    whole = torch.tensor(words, dtype=torch.int64, device="cpu")
    if numbers is not None:
        whole = torch.cat([whole, numbers], dim=1)
    # From pinned memory, or the copy would wait for the device.
    there = (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
    return Table(there, torch.repeat_interleave(there[:, 1].int(), output_size=programs))


def aligned(tensors: Iterable[Tensor]) -> bool:
    """Say whether all addresses and sizes allow the widest accesses, as a launch for one tensor finds out by itself."""
    return all(tensor.data_ptr() % _ALIGNMENT == 0 and tensor.numel() % _ALIGNMENT == 0 for tensor in tensors)


def grouped(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Return the positions of each key: those of tensors that a launch can take together."""
    groups: dict[Key, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return groups


@jit
def own_row(rows_ptr, row_of_ptr, WORDS: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's row, its number among the programs of the row, and the elements of the row's tensors."""
    program = tl.program_id(0)
    row_ptr = rows_ptr + tl.load(row_of_ptr + program).to(tl.int64) * WORDS
    count = tl.load(row_ptr + 2)
    return row_ptr, program - tl.load(row_ptr), tl.multiple_of(count, 16) if ALIGNED else count


@jit
def address(row_ptr, WORD: tl.constexpr, type_: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the address in a word of a row, as a pointer of a type."""
    pointer = tl.load(row_ptr + WORD).to(type_)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer
