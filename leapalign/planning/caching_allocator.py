"""What PyTorch's caching allocator reserves on a GPU for storages that come and go: its rules, without the GPU.

Written from the rules of ``c10/cuda/CUDACachingAllocator.cpp`` of PyTorch 2.13, for one stream and no limit: blocks are
multiples of 512 bytes; those of at most 1 MiB come from a pool of their own; the smallest free block that fits is
taken, and split; neighbours that are free become one. Where none fits, with ``expandable_segments`` the pool's one
segment grows at its end by pages of 2 or 20 MiB; else a new segment is reserved, which nothing else can join.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
_ROUND = 512
_SMALL = MIB
"""Bytes of the largest block of the small pool."""
_PAGES = {True: 2 * MIB, False: 20 * MIB}
"""Of small and of large blocks: by which segments grow, and what a segment has at least."""
_OWN_SEGMENT = 10 * MIB
"""From here on a block gets a segment of its own size, in steps of 2 MiB."""

Event = tuple[int, int]
"""A storage's number, and the bytes that it takes; 0: it is freed."""


@dataclass(slots=True)
class _Block:
    size: int
    free: bool
    before: int | None = None
    """Where its neighbour in the segment starts."""
    after: int | None = None


class _Pool:
    """Blocks by address. Segments lie far apart; an expandable one is the only one, and its end moves."""

    def __init__(self, small: bool, expandable: bool) -> None:
        self.reserved = 0
        self._page, self._expandable = _PAGES[small], expandable
        self._blocks: dict[int, _Block] = {}
        self._free: list[tuple[int, int]] = []
        """Sizes and addresses, smallest first."""
        self._last: int | None = None
        """The block at the end of the expandable segment."""
        self._next_segment = 0

    def take(self, size: int) -> int:
        """The address of ``size`` bytes, a multiple of 512."""
        address = self._fitting(size)
        if address is None:
            address = self._grown(size) if self._expandable else self._new_segment(size)
        self._drop_free(address)
        block = self._blocks[address]
        block.free = False
        if block.size > size:
            self._split(address, size)
        return address

    def give_back(self, address: int) -> None:
        block = self._blocks[address]
        block.free = True
        self._take_in_next(address)
        if block.before is not None and self._blocks[block.before].free:
            address = block.before
            self._take_in_next(address)
        insort(self._free, (self._blocks[address].size, address))

    def _fitting(self, size: int) -> int | None:
        found = bisect_left(self._free, (size, -1))
        for _, address in self._free[found : found + 2]:
            # What can still grow is taken last.
            if address != self._last:
                return address
        return self._free[found][1] if found < len(self._free) else None

    def _grown(self, size: int) -> int:
        last = self._last
        there = self._blocks[last].size if last is not None and self._blocks[last].free else 0
        more = -(-(size - there) // self._page) * self._page
        self.reserved += more
        if last is not None and there:
            self._drop_free(last)
            self._blocks[last].size += more
            address = last
        else:
            address = last + self._blocks[last].size if last is not None else 0
            self._blocks[address] = _Block(more, True, before=last)
            if last is not None:
                self._blocks[last].after = address
        self._last = address
        insort(self._free, (self._blocks[address].size, address))
        return address

    def _new_segment(self, size: int) -> int:
        step = 2 * MIB if size >= _OWN_SEGMENT else self._page
        address, size = self._next_segment, -(-size // step) * step
        self._next_segment += size
        self.reserved += size
        self._blocks[address] = _Block(size, True)
        insort(self._free, (size, address))
        return address

    def _split(self, address: int, size: int) -> None:
        block, rest = self._blocks[address], address + size
        self._blocks[rest] = _Block(block.size - size, True, before=address, after=block.after)
        if block.after is not None:
            self._blocks[block.after].before = rest
        block.size, block.after = size, rest
        if self._last == address:
            self._last = rest
        insort(self._free, (self._blocks[rest].size, rest))

    def _take_in_next(self, address: int) -> None:
        """Has the free block at ``address`` be one with the next, where this is free, too."""
        block = self._blocks[address]
        gone = block.after
        self._drop_free(address)
        if gone is None or not self._blocks[gone].free:
            return
        self._drop_free(gone)
        after = self._blocks.pop(gone)
        block.size, block.after = block.size + after.size, after.after
        if block.after is not None:
            self._blocks[block.after].before = address
        if self._last == gone:
            self._last = address

    def _drop_free(self, address: int) -> None:
        entry = (self._blocks[address].size, address)
        place = bisect_left(self._free, entry)
        if place < len(self._free) and self._free[place] == entry:
            del self._free[place]


def reserved(events: Iterable[Event], expandable_segments: bool = True) -> int:
    """Bytes that the allocator holds in the end, in use or not: the most it held, as it gives none back by itself."""
    pools = {small: _Pool(small, expandable_segments) for small in (True, False)}
    living: dict[int, tuple[_Pool, int]] = {}
    for storage, size in events:
        if size:
            rounded = -(-size // _ROUND) * _ROUND
            pool = pools[rounded <= _SMALL]
            living[storage] = pool, pool.take(rounded)
        else:
            pool, address = living.pop(storage)
            pool.give_back(address)
    return sum(pool.reserved for pool in pools.values())
