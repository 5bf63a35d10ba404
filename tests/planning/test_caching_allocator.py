"""The allocator's rules, by hand; and, for storages at random, what holds whatever the rules."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from leapalign.planning.caching_allocator import MIB, Event, reserved

BOTH = pytest.mark.parametrize("expandable", [True, False])


def taken(*sizes: float) -> list[Event]:
    """So many MiB each, and none given back."""
    return [(number, int(size * MIB)) for number, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "expandable", "fixed"),
    [
        ((1 / MIB,), 2, 2),
        ((1, 1), 2, 2),
        ((1, 1, 1 / MIB), 4, 4),
        ((1 + 1 / MIB,), 20, 20),
        ((9.9,) * 2, 20, 20),
        ((9.9,) * 3, 40, 40),
        ((10,), 20, 10),  # a segment of its own
        ((11,), 20, 12),
        ((11,) * 4, 60, 48),
        ((19.5, 1), 22, 22),  # the rest of a page is for large blocks only
    ],
)
def test_what_is_reserved_for_blocks_that_stay(sizes: tuple[float, ...], expandable: int, fixed: int) -> None:
    assert reserved(taken(*sizes)) == expandable * MIB
    assert reserved(taken(*sizes), expandable_segments=False) == fixed * MIB


@BOTH
def test_what_was_freed_is_used_again(expandable: bool) -> None:
    events = [*taken(40), (0, 0), (1, 40 * MIB), (1, 0), (2, 30 * MIB), (3, 10 * MIB)]
    assert reserved(events, expandable) == 40 * MIB


def test_neighbours_that_are_free_become_one_where_a_segment_grows() -> None:
    """Two of 40 MiB make room for one of 80; of fixed segments neither can join the other."""
    events = [*taken(40, 40), (0, 0), (1, 0), (2, 80 * MIB)]
    assert reserved(events) == 80 * MIB
    assert reserved(events, expandable_segments=False) == 160 * MIB


def test_the_end_grows_by_what_lacks() -> None:
    events = [*taken(40, 40), (1, 0), (2, 60 * MIB)]
    assert reserved(events) == 100 * MIB


def test_a_gap_that_is_too_small_stays() -> None:
    events = [*taken(40, 20), (0, 0), (2, 60 * MIB)]
    assert reserved(events) == 120 * MIB
    assert reserved([*events, (3, 40 * MIB)]) == 120 * MIB, "until something fits it"


def test_the_smallest_gap_that_fits_is_taken_and_the_end_last() -> None:
    """Of gaps of 60, 40, and, at the end, 30 MiB, 30 MiB go into that of 40, and 60 still fit the first."""
    events = [*taken(60, 20, 40, 20, 40, 20), (5, 0), (0, 0), (2, 0), (4, 0)]
    assert reserved(events) == 200 * MIB
    assert reserved([*events, (6, 30 * MIB), (7, 60 * MIB), (8, 60 * MIB)]) == 200 * MIB


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_at_random_it_holds_what_lives_and_not_much_more(expandable: bool, seed: int) -> None:
    events = list(storages(random.Random(seed)))
    live, most, sizes = 0, 0, {}
    for storage, size in events:
        live += size or -sizes.pop(storage)
        if size:
            sizes[storage] = size
        most = max(most, live)
    assert most <= reserved(events, expandable) <= 1.6 * most + 40 * MIB
    twice = [*events, *((storage, 0) for storage in sizes)]
    again = [(storage + 10_000, size) for storage, size in twice]
    assert reserved([*twice, *again], expandable) == reserved(events, expandable), "from empty it goes as before"


def storages(chance: random.Random) -> Iterator[Event]:
    living: list[int] = []
    for number in range(1500):
        yield number, int(2 ** chance.uniform(5, 27))
        living.append(number)
        while len(living) > 40 or (living and chance.random() < 0.45):
            yield living.pop(chance.randrange(len(living))), 0
